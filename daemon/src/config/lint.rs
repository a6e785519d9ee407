//! Globs that can never match: names are normalised before they are matched, globs are not.

use super::glob::Piece;
use super::problem::Complaint;
use super::yaml::shortened;
use crate::reference::{Pointer, Reference};

/// Refuses what no normalised name can match, with the glob that was probably meant.
pub(super) fn check(text: &str, pieces: &[Piece]) -> Result<(), Complaint> {
    if let Some((_, rest)) = text.split_once("://") {
        return Err(never("an image name has no scheme").help(format!("write {rest}")));
    }
    characters(pieces)?;
    let components: Vec<&[Piece]> = pieces.split(|piece| *piece == Piece::Char('/')).collect();
    recursion(&components)?;
    if let Some(name) = literal(pieces) {
        return whole_name(&name);
    }
    match components.as_slice() {
        [] => Ok(()),
        [only] => single(text, only),
        [registry, path @ .., last] => {
            separators(path, last)?;
            let normalised = normal_registry(text, registry)?;
            letters(path, last)?;
            hub(text, &normalised, path, last)
        }
    }
}

fn never(why: impl std::fmt::Display) -> Complaint {
    Complaint::new(format!("no image can ever match: {why}"))
}

fn literal(pieces: &[Piece]) -> Option<String> {
    pieces.iter().map(|piece| if let Piece::Char(c) = piece { Some(*c) } else { None }).collect()
}

fn characters(pieces: &[Piece]) -> Result<(), Complaint> {
    let bad = |c: &char| !(c.is_ascii_alphanumeric() || "._-/:@[]".contains(*c));
    let bad_inside = |text: &str| text.chars().find(|c| *c != ',' && bad(c));
    let found = pieces.iter().find_map(|piece| match piece {
        Piece::Char(c) => Some(*c).filter(bad),
        Piece::Class(text) | Piece::Alternatives(text) => bad_inside(text),
        Piece::Star | Piece::AnyChar => None,
    });
    match found {
        Some(c) => Err(never(format!("no image name holds `{}`", c.escape_debug()))),
        None => Ok(()),
    }
}

/// globset reads `**` as `*` unless it is a path component.
fn recursion(components: &[&[Piece]]) -> Result<(), Complaint> {
    let doubled = |component: &&[Piece]| component.windows(2).any(|w| w == [Piece::Star, Piece::Star]);
    match components.iter().filter(|c| doubled(c)).any(|c| c.len() != 2) {
        true => Err(Complaint::new("`**` must be a whole path component")
            .help("write `*` within a component, or `/**` for everything below a path")),
        false => Ok(()),
    }
}

/// A glob without wildcards is a name, so it is read as one.
fn whole_name(name: &str) -> Result<(), Complaint> {
    if let Some(parent) = name.strip_suffix('/') {
        return Err(never("it ends in `/`").help(format!("write {parent}/** for everything below it")));
    }
    let reference = Reference::parse(name).map_err(|error| {
        let complaint = never(error);
        match name.bytes().any(|b| b.is_ascii_uppercase()) {
            true => complaint.help(format!("write {}", name.to_ascii_lowercase())),
            false => complaint,
        }
    })?;
    let (repository, full) = (reference.repository.to_string(), reference.to_string());
    if name == repository || name == full {
        return Ok(());
    }
    let written = name.split_once('@').map_or(name, |(before, _)| before);
    let tagged = written.rsplit('/').next().is_some_and(|last| last.contains(':'));
    let hostlike = |host: &str| host == "localhost" || host.contains('.');
    if !name.contains('/') && name.split([':', '@']).next().is_some_and(hostlike) {
        return Err(never("it is a registry without a repository").help(format!("write {name}/**")));
    }
    if tagged && name.contains('@') {
        return Err(never("beside a digest the tag is dropped").help(format!("write {full}")));
    }
    let meant = match (&reference.pointer, tagged) {
        (Pointer::Tag(_), false) => repository,
        _ => full,
    };
    Err(never("images are matched by their full names").help(format!("write {meant}")))
}

/// Patterns without a `/`: only `**` can match, since every name has a registry.
fn single(text: &str, pieces: &[Piece]) -> Result<(), Complaint> {
    if pieces == [Piece::Star, Piece::Star] {
        return Ok(());
    }
    let complaint = never("images are matched by their full names, from the registry on");
    if pieces.iter().all(|piece| *piece == Piece::Star) {
        return Err(complaint.help("write ** for every image"));
    }
    let repository = text.split(':').next().unwrap_or(text);
    Err(match repository.contains('.') {
        true => complaint.help(format!("write {text}/**")),
        false => complaint.help(format!("write docker.io/library/{text}")),
    })
}

/// Empty components, and `:` and `@` where no name has them.
fn separators(path: &[&[Piece]], last: &[Piece]) -> Result<(), Complaint> {
    if path.iter().any(|component| component.is_empty()) {
        return Err(never("it holds `//`").help("remove one `/`"));
    }
    if last.is_empty() {
        return Err(never("it ends in `/`").help("end it with /** for everything below"));
    }
    let is = |c: char| move |piece: &Piece| *piece == Piece::Char(c);
    if path.iter().any(|component| component.iter().any(|p| is(':')(p) || is('@')(p))) {
        return Err(never("a `:` or `@` stands before the last `/`"));
    }
    match (last.iter().position(is(':')), last.iter().position(is('@'))) {
        (Some(colon), Some(at)) if colon < at => {
            Err(never("beside a digest the tag is dropped").help("leave out the tag, or the digest"))
        }
        _ => Ok(()),
    }
}

/// Checks the registry, if it is written without wildcards; gives it as it was written.
fn normal_registry(text: &str, pieces: &[Piece]) -> Result<Option<String>, Complaint> {
    let Some(written) = literal(pieces) else { return Ok(None) };
    if written.is_empty() {
        return Err(never("it begins with `/`").help(format!("write {}", text.trim_start_matches('/'))));
    }
    let reference = Reference::parse(&format!("{written}/x/y")).map_err(|error| {
        never(format!("the registry `{}`: {error}", shortened(&written)))
            .help(format!("write {}", text.to_ascii_lowercase()))
    })?;
    let registry = reference.repository.registry();
    if registry == written {
        return Ok(Some(written));
    }
    let rest = text.split_once('/').map_or("", |(_, rest)| rest);
    let meant = match (reference.repository.path(), written.starts_with('[')) {
        ("x/y", true) => format!("{}/{rest}", registry.replace('[', r"\[").replace(']', r"\]")),
        ("x/y", false) => format!("{registry}/{rest}"),
        _ => format!("{registry}/{text}"),
    };
    Err(never(format!("`{}` is not how a registry is named in full", shortened(&written)))
        .help(format!("write {meant}")))
}

/// Repositories are lower case; tags need not be.
fn letters(path: &[&[Piece]], last: &[Piece]) -> Result<(), Complaint> {
    let repository = last.split(|piece| *piece == Piece::Char(':')).next().unwrap_or_default();
    let upper = |piece: &Piece| match piece {
        Piece::Char(c) => c.is_ascii_uppercase(),
        Piece::Class(text) | Piece::Alternatives(text) => text.bytes().any(|b| b.is_ascii_uppercase()),
        Piece::Star | Piece::AnyChar => false,
    };
    match path.iter().copied().chain([repository]).flatten().any(upper) {
        true => Err(never("repositories are in lower case").help("write the repository in lower case")),
        false => Ok(()),
    }
}

/// On Docker Hub what has no namespace is in `library/`.
fn hub(text: &str, registry: &Option<String>, path: &[&[Piece]], last: &[Piece]) -> Result<(), Complaint> {
    let anything = last == [Piece::Star, Piece::Star];
    if registry.as_deref() != Some("docker.io") || !path.is_empty() || anything {
        return Ok(());
    }
    let rest = text.split_once('/').map_or("", |(_, rest)| rest);
    Err(never("on docker.io every repository has a namespace")
        .help(format!("write docker.io/library/{rest}")))
}

#[cfg(test)]
mod tests {
    use crate::config::glob::ImageGlob;

    #[test]
    fn globs_that_can_never_match_are_errors_with_the_glob_that_was_meant() {
        let hex = "a".repeat(64);
        let tag_and_digest = format!("quay.io/a:1@sha256:{hex}");
        for (glob, help) in [
            ("busybox", "write docker.io/library/busybox"),
            ("busybox:1.36", "write docker.io/library/busybox:1.36"),
            ("busybox:1.*", "write docker.io/library/busybox:1.*"),
            ("nginx*", "write docker.io/library/nginx*"),
            ("*", "write ** for every image"),
            ("library/busybox", "write docker.io/library/busybox"),
            ("nginx/**", "write docker.io/nginx/**"),
            ("docker.io/busybox", "write docker.io/library/busybox"),
            ("docker.io/*", "write docker.io/library/*"),
            ("docker.io/busy*:1", "write docker.io/library/busy*:1"),
            ("index.docker.io/library/busybox", "write docker.io/library/busybox"),
            ("index.docker.io/**", "write docker.io/**"),
            ("registry.example.com", "write registry.example.com/**"),
            ("localhost:5000", "write localhost:5000/**"),
            ("*.example.com", "write *.example.com/**"),
            ("https://quay.io/**", "write quay.io/**"),
            ("quay.io/Team/**", "write the repository in lower case"),
            ("quay.io/Team/app", "write quay.io/team/app"),
            ("Quay.io/**", "write quay.io/**"),
            ("quay.io/[A-Z]*", "write the repository in lower case"),
            ("quay.io/team/", "write quay.io/team/**"),
            ("quay.io/*/", "end it with /**"),
            ("quay.io//*", "remove one `/`"),
            ("/quay.io/**", "write quay.io/**"),
            ("[::1]:5000/**", r"write \[::1\]:5000/**"),
            (r"\[0:0::1\]:5000/**", r"write \[::1\]:5000/**"),
            ("quay.io/a:*@sha256:*", "leave out the tag"),
            (&tag_and_digest, &format!("write quay.io/a@sha256:{hex}")),
        ] {
            let complaint = ImageGlob::parse(glob).expect_err(glob);
            assert!(
                complaint.message.contains("ever match") || glob.starts_with('['),
                "{glob}: {complaint:?}"
            );
            let found = complaint.help.clone().unwrap_or_default();
            assert!(found.contains(help), "{glob}: {complaint:?}");
        }
    }

    #[test]
    fn globs_that_would_be_read_otherwise_are_errors() {
        for (glob, part) in [
            ("quay.io/a**", "whole path component"),
            ("quay.io/**a", "whole path component"),
            ("quay.io/***", "whole path component"),
            ("quay.io/a[!b]c", "would match a `/` too"),
            ("quay.io/a[^b]c", "would match a `/` too"),
            ("quay.io/a[+-9]c", "is not a list of characters"),
            ("quay.io/a[b", "never closed"),
            ("quay.io/a{b", "never closed"),
            ("quay.io/a]b", "never opened"),
            ("quay.io/{a/b,c}", "more than parts"),
            ("quay.io/{a:1,b}", "more than parts"),
            ("quay.io/{**,b}", "more than parts"),
            (r"quay.io/a\*", "backslash"),
            ("quay.io/a\\", "backslash"),
            ("quay.io/a b*", "holds ` `"),
            ("quay.io/ä*", "holds `ä`"),
            ("quay.io/a:b/*", "before the last `/`"),
            ("quay.io/[b-a]*", "can't be read"),
            ("", "empty"),
        ] {
            let complaint = ImageGlob::parse(glob).expect_err(glob);
            assert!(complaint.message.contains(part), "{glob}: {complaint:?}");
        }
        assert!(ImageGlob::parse(&"a".repeat(2000)).is_err());
    }

    #[test]
    fn good_globs_are_left_alone() {
        for glob in [
            "**",
            "**/app",
            "*/app",
            "*.example.com/**",
            "docker.io/**",
            "docker.io/library/*",
            "123456789012.dkr.ecr.us-west-2.amazonaws.com/**",
            "localhost:5000/**",
            "localhost/a",
            "quay.io/a:V1*",
            "quay.io/a:RC",
            r"\[::1\]:5000/a",
            "quay.io/{a,b}-[0-9]/**",
        ] {
            ImageGlob::parse(glob).unwrap_or_else(|complaint| panic!("{glob}: {complaint:?}"));
        }
    }
}
