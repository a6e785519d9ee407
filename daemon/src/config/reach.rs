//! Rules that can never be reached, because an earlier one takes all that they would match.

use std::collections::HashMap;

use super::glob::ImageGlob;
use super::problem::Complaint;

/// What the rules so far take, with the line of the rule that does.
#[derive(Default)]
pub(super) struct Reach {
    globs: HashMap<String, usize>,
    below: HashMap<String, usize>,
    repositories: HashMap<String, usize>,
}

impl Reach {
    /// Adds a rule, unless an earlier one leaves it nothing.
    pub fn add(&mut self, text: &str, glob: &ImageGlob, line: usize) -> Result<(), Complaint> {
        if let Some(first) = self.globs.get(text) {
            return Err(Complaint::new(format!(
                "this rule is never reached: line {first} has the same glob"
            ))
            .help("remove one of the two; the first decides"));
        }
        if let Some((first, cover)) = self.cover(glob) {
            return Err(Complaint::new(format!(
                "this rule is never reached: `{cover}` in line {first} matches all of it"
            ))
            .help(format!("move it before line {first}")));
        }
        self.globs.insert(text.to_owned(), line);
        if let Some(prefix) = glob.everything_below() {
            self.below.insert(prefix.to_owned(), line);
        }
        if let Some(repository) = glob.whole_repository() {
            self.repositories.insert(repository.to_owned(), line);
        }
        Ok(())
    }

    fn cover(&self, glob: &ImageGlob) -> Option<(usize, String)> {
        let prefix = glob.prefix();
        let ends = prefix.match_indices('/').map(|(at, _)| at + 1);
        let covering = |end: usize| {
            let parent = prefix.get(..end)?;
            self.below.get(parent).map(|line| (*line, format!("{parent}**")))
        };
        std::iter::once(0).chain(ends).find_map(covering).or_else(|| {
            let repository = glob.only_repository()?;
            self.repositories.get(repository).map(|line| (*line, repository.to_owned()))
        })
    }
}
