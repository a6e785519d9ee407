//! Rules that can never be reached, because an earlier one takes all that they would match.

use std::collections::HashMap;

use super::glob::ImageGlob;
use super::problem::Complaint;
use crate::reference::Reference;

/// What the rules so far take, with the line of the rule that does.
#[derive(Default)]
pub(super) struct Reach {
    globs: HashMap<String, usize>,
    below: HashMap<String, usize>,
    /// Those of `below` whose rules do not just allow: they count for a registry's other spellings too.
    restricting: HashMap<String, usize>,
    repositories: HashMap<String, usize>,
}

impl Reach {
    /// Adds a rule, unless an earlier one leaves it nothing.
    pub fn add(
        &mut self,
        text: &str,
        glob: &ImageGlob,
        line: usize,
        restricts: bool,
    ) -> Result<(), Complaint> {
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
            if restricts {
                self.restricting.insert(prefix.to_owned(), line);
            }
        }
        if let Some(repository) = glob.whole_repository() {
            self.repositories.insert(repository.to_owned(), line);
        }
        Ok(())
    }

    fn cover(&self, glob: &ImageGlob) -> Option<(usize, String)> {
        let repository = || {
            let repository = glob.only_repository()?;
            self.repositories.get(repository).map(|line| (*line, repository.to_owned()))
        };
        let plain = || parent(&self.restricting, &plain(glob.prefix())?);
        parent(&self.below, glob.prefix()).or_else(repository).or_else(plain)
    }
}

/// The first of `below` under which everything that begins with `prefix` is.
fn parent(below: &HashMap<String, usize>, prefix: &str) -> Option<(usize, String)> {
    let ends = prefix.match_indices('/').map(|(at, _)| at + 1);
    let covering = |end: usize| {
        let parent = prefix.get(..end)?;
        below.get(parent).map(|line| (*line, format!("{parent}**")))
    };
    std::iter::once(0).chain(ends).find_map(covering)
}

/// `prefix` with the plain name of its registry, where it is written with another.
fn plain(prefix: &str) -> Option<String> {
    let (registry, path) = prefix.split_once('/')?;
    let repository = Reference::parse(&format!("{registry}/x/y")).ok()?.repository.plain()?;
    Some(format!("{}/{path}", repository.registry()))
}
