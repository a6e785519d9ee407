//! The rules in file order, and the index that finds the first match among thousands.

use std::collections::HashMap;

use super::glob::ImageGlob;
use super::rule::{Rule, Strategy};
use crate::reference::Reference;

/// The rules, in file order: the first that matches decides.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    rules: Vec<Rule>,
    globs: Vec<ImageGlob>,
    index: Index,
}

impl Policy {
    pub(super) fn new(rules: Vec<(Rule, ImageGlob)>) -> Self {
        let (rules, globs): (Vec<Rule>, Vec<ImageGlob>) = rules.into_iter().unzip();
        let index = Index::new(&globs);
        Self { rules, globs, index }
    }

    /// The first rule, in file order, whose glob matches the name. What a rule asks of a repository
    /// it asks under every spelling of it ([`Repository::plain`](crate::reference::Repository::plain)),
    /// but it allows only the name that it matches: containerd may reach another through other mirrors.
    pub fn find(&self, reference: &Reference) -> Option<&Rule> {
        let own = self.first(reference);
        let plain = reference
            .repository
            .plain()
            .map(|repository| self.first(&Reference { repository, pointer: reference.pointer.clone() }));
        let restricts =
            |rule: &usize| self.rules.get(*rule).is_some_and(|rule| rule.strategy != Strategy::Allow);
        self.rules.get(plain.filter(restricts).map_or(own, |plain| plain.min(own)))
    }

    /// The first rule's place; behind the last one where none matches.
    fn first(&self, reference: &Reference) -> usize {
        let (repository, full) = (reference.repository.to_string(), reference.to_string());
        let mut first = usize::MAX;
        for candidates in self.index.candidates(&repository, &full) {
            let earlier = candidates.iter().copied().take_while(|&rule| rule < first);
            let matching =
                |rule: &usize| self.globs.get(*rule).is_some_and(|g| g.matches(&repository, &full));
            first = { earlier }.find(matching).unwrap_or(first);
        }
        first
    }

    /// Every rule, in file order.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }
}

/// Where to look for the rules that may match a name: each rule is under what its names begin
/// with or under what they end with, whichever is longer, as in `**/app`.
#[derive(Clone, Debug, Default)]
struct Index {
    beginnings: PrefixIndex,
    /// Of repositories, backwards.
    endings: PrefixIndex,
    /// Of names with their tag or digest, backwards.
    whole_endings: PrefixIndex,
}

impl Index {
    fn new(globs: &[ImageGlob]) -> Self {
        let by_ending = |glob: &ImageGlob| glob.suffix().len() > glob.prefix().len();
        let numbered = || globs.iter().enumerate();
        let beginnings = numbered().filter(|(_, glob)| !by_ending(glob));
        let endings = |whole: bool| {
            let own = numbered().filter(move |(_, glob)| by_ending(glob) && glob.whole() == whole);
            PrefixIndex::new(own.map(|(rule, glob)| (rule, backwards(glob.suffix()))))
        };
        Self {
            beginnings: PrefixIndex::new(beginnings.map(|(rule, glob)| (rule, glob.prefix().into()))),
            endings: endings(false),
            whole_endings: endings(true),
        }
    }

    /// Rules, each list of them ascending.
    fn candidates<'a>(&'a self, repository: &str, full: &str) -> Vec<&'a [usize]> {
        let (repository, whole) = (backwards(repository), backwards(full));
        let endings = self.endings.prefixes_of(&repository);
        let whole_endings = self.whole_endings.prefixes_of(&whole);
        self.beginnings.prefixes_of(full).chain(endings).chain(whole_endings).collect()
    }
}

fn backwards(text: &str) -> Box<str> {
    text.chars().rev().collect()
}

/// Finds all texts of a set that a name begins with: one binary search, then a walk from the
/// longest to ever shorter ones. Neighbours in sort order that begin alike make this work: the
/// last text not after the name, or one of those that this text begins with, is the longest.
#[derive(Clone, Debug, Default)]
struct PrefixIndex {
    sorted: Vec<Prefix>,
}

#[derive(Clone, Debug)]
struct Prefix {
    text: Box<str>,
    /// The longest other text that this one begins with.
    parent: Option<usize>,
    /// Whose prefix this is, ascending.
    owners: Vec<usize>,
}

impl PrefixIndex {
    fn new(texts: impl Iterator<Item = (usize, Box<str>)>) -> Self {
        let mut owners: HashMap<Box<str>, Vec<usize>> = HashMap::new();
        for (owner, text) in texts {
            owners.entry(text).or_default().push(owner);
        }
        let mut groups: Vec<(Box<str>, Vec<usize>)> = owners.into_iter().collect();
        groups.sort_unstable();
        let mut open: Vec<usize> = Vec::new();
        let mut sorted: Vec<Prefix> = Vec::with_capacity(groups.len());
        for (place, (text, owners)) in groups.into_iter().enumerate() {
            let begins = |parent: &usize| sorted.get(*parent).is_some_and(|p| text.starts_with(&*p.text));
            while open.pop_if(|parent| !begins(parent)).is_some() {}
            let parent = open.last().copied();
            open.push(place);
            sorted.push(Prefix { text, parent, owners });
        }
        Self { sorted }
    }

    fn prefixes_of<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a [usize]> {
        let last = self.sorted.partition_point(|prefix| *prefix.text <= *name).checked_sub(1);
        let at = |place: usize| self.sorted.get(place);
        std::iter::successors(last.and_then(at), move |prefix| prefix.parent.and_then(at))
            .filter(move |prefix| name.starts_with(&*prefix.text))
            .map(|prefix| prefix.owners.as_slice())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use globset::GlobMatcher;

    use super::*;
    use crate::config::glob::build;
    use crate::config::rule::Strategy;

    fn policy(globs: &[String]) -> Policy {
        let rule = |(line, glob): (usize, &String)| {
            let rule = Rule {
                name: glob.clone(),
                image_glob: glob.clone(),
                strategy: Strategy::Allow,
                line: line + 1,
            };
            (rule, ImageGlob::parse(glob).unwrap_or_else(|c| panic!("{glob}: {c:?}")))
        };
        Policy::new(globs.iter().enumerate().map(rule).collect())
    }

    /// What the documentation says, without index or short cuts.
    fn naive(globs: &[(String, GlobMatcher)], reference: &Reference) -> Option<usize> {
        globs.iter().position(|(text, matcher)| {
            let last = text.rsplit('/').next().unwrap();
            let whole = last != text && (last.contains(':') || last.contains('@'));
            let name = if whole { reference.to_string() } else { reference.repository.to_string() };
            let over_tags = whole && !last.contains('@');
            matcher.is_match(&name) && !(over_tags && name.contains('@'))
        })
    }

    /// xorshift: the same names and globs in every run.
    struct Dice(u64);

    impl Dice {
        fn roll(&mut self, sides: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % sides as u64) as usize
        }

        fn pick<'a>(&mut self, choices: &[&'a str]) -> &'a str {
            choices[self.roll(choices.len())]
        }
    }

    fn image(dice: &mut Dice) -> String {
        let mut name = dice.pick(&["docker.io", "quay.io", "a.b", "host:5000", "[::1]:5000"]).to_owned();
        for _ in 0..=dice.roll(3) {
            name = format!("{name}/{}", dice.pick(&["a", "b", "ab", "abc", "a-b", "library"]));
        }
        name + dice.pick(&["", ":1", ":1.2", ":a", &format!("@sha256:{}", "1".repeat(64))])
    }

    fn glob(dice: &mut Dice) -> String {
        let mut text = dice
            .pick(&["docker.io", "quay.io", "*.b", "**", "*", "host:5000", r"\[::1\]:5000", "a.?"])
            .to_owned();
        for _ in 0..=dice.roll(3) {
            let part = dice
                .pick(&["a", "b", "a*", "*b", "**", "*", "?", "[ab]", "a[b-c]", "{a,b}", "ab?", "library"]);
            text = format!("{text}/{part}");
        }
        if text.ends_with("**") {
            text
        } else {
            text + dice.pick(&["", "", ":1", ":*", ":1.?", "@*", "[:@]*"])
        }
    }

    #[test]
    fn the_index_answers_as_a_naive_scan_does() {
        let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
        let mut hits = 0;
        for _ in 0..100 {
            let count = 1 + dice.roll(12);
            let globs: Vec<String> = std::iter::repeat_with(|| glob(&mut dice))
                .filter(|text| ImageGlob::parse(text).is_ok())
                .take(count)
                .collect();
            let policy = policy(&globs);
            let matchers: Vec<_> = globs
                .into_iter()
                .map(|text| (text.clone(), build(&text).unwrap().compile_matcher()))
                .collect();
            for _ in 0..30 {
                let reference = Reference::parse(&image(&mut dice)).unwrap();
                let found = policy.find(&reference).map(|rule| rule.line - 1);
                assert_eq!(found, naive(&matchers, &reference), "{reference} in {matchers:#?}");
                hits += usize::from(found.is_some());
            }
        }
        assert!(hits > 200, "the generator makes too few matches: {hits}");
    }

    #[test]
    fn another_spelling_of_the_registry_is_no_way_around_a_rule() {
        let text = "\
verificationRules:
  - {imageGlob: quay.io/allowed/*, strategy: allow}
  - {imageGlob: quay.io/**, strategy: deny}
  - {imageGlob: docker.io/library/*, strategy: deny}
  - {imageGlob: 'ghcr.io:443/**', strategy: allow}
  - {imageGlob: ghcr.io/**, strategy: deny}
  - {imageGlob: 'gcr.io/**', strategy: allow}
";
        let config = crate::config::Config::parse(std::path::Path::new("t"), text).unwrap().config;
        let line = |image: &str| config.policy.find(&Reference::parse(image).unwrap()).map(|rule| rule.line);
        assert_eq!(line("quay.io:443/a/b"), Some(3));
        assert_eq!(line("quay.io:8443/a/b"), None);
        assert_eq!(line("quay.io/allowed/a"), Some(2));
        assert_eq!(line("registry-1.docker.io/busybox:1"), Some(4));
        assert_eq!(line("ghcr.io:443/a"), Some(5), "the rule in file order, where both are written");
        assert_eq!(line("gcr.io:443/a"), None, "an allow is for the name as written");
    }

    #[test]
    fn file_order_wins_over_the_longer_prefix() {
        let globs = ["quay.io/a/*", "quay.io/a/b", "quay.io/**"].map(str::to_owned);
        let found =
            |image: &str| policy(&globs).find(&Reference::parse(image).unwrap()).map(|rule| rule.line);
        assert_eq!(found("quay.io/a/b"), Some(1));
        assert_eq!(found("quay.io/c"), Some(3));
        assert_eq!(found("docker.io/a/b"), None);
    }

    /// The bar is 20 µs in a release build; tests are built without optimisation.
    #[test]
    fn ten_thousand_rules_are_searched_at_once() {
        let forms =
            ["quay.io/team-{}/app", "quay.io/team-{}/**", "quay.io/team-{}/*", "quay.io/team-{}/*:v*"];
        let mut globs: Vec<String> = (0..9_900).map(|n| forms[n % 4].replace("{}", &n.to_string())).collect();
        globs.extend((0..50).map(|n| format!("**/team-{n}/app")));
        globs.extend((0..50).map(|n| format!("quay.io/*/app-{n}:v*")));
        let policy = policy(&globs);
        let mut slowest = Duration::ZERO;
        for (image, line) in [
            ("quay.io/team-0/app", Some(1)),
            ("quay.io/team-9899/app:v1", Some(9_900)),
            ("host/team-49/app", Some(9_950)),
            ("quay.io/x/app-49:v1", Some(10_000)),
            ("quay.io/nobody/nothing", None),
        ] {
            let reference = Reference::parse(image).unwrap();
            policy.find(&reference);
            let start = Instant::now();
            for _ in 0..100 {
                assert_eq!(policy.find(&reference).map(|rule| rule.line), line, "{image}");
            }
            println!("{image}: {:?} each", start.elapsed() / 100);
            slowest = slowest.max(start.elapsed() / 100);
        }
        let bar = Duration::from_micros(if cfg!(debug_assertions) { 2000 } else { 20 });
        assert!(slowest < bar, "{slowest:?}");
    }
}
