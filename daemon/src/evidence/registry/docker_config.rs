//! Credentials that lie on the node: Docker's `config.json`, as the kubelet reads it
//! (pkg/credentialprovider/keyring.go): host globs and path prefixes, most specific first.
//!
//! One difference, on purpose: a path prefix ends at a `/`. `host/team` is not for
//! `host/team-b`. Credential helpers (`credsStore`, `credHelpers`) are not run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use tokio::time::Instant;

use super::credentials::{Login, Secret, Source, decode_basic};
use super::hosts::read_file;

/// A changed file is seen after this long at the latest.
const FRESH: Duration = Duration::from_secs(5);

/// The configured files, in order; what they hold is remembered for a few seconds.
pub(super) struct DockerConfigs {
    paths: Vec<PathBuf>,
    read: Mutex<Option<(Instant, Arc<[Entry]>)>>,
}

/// One key of `auths`. No `Debug`: it holds a secret.
struct Entry {
    host: String,
    path: String,
    secret: Secret,
    file: PathBuf,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    auths: BTreeMap<String, Auth>,
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Auth {
    auth: String,
    username: String,
    password: String,
    #[serde(rename = "identitytoken")]
    identity_token: String,
    #[serde(rename = "registrytoken")]
    registry_token: String,
}

impl DockerConfigs {
    pub(super) fn new(paths: Vec<PathBuf>) -> Self {
        Self { paths, read: Mutex::default() }
    }

    /// The login for a repository: of the first file that has one, the most specific.
    pub(super) async fn login(&self, registry: &str, repository_path: &str) -> Option<Login> {
        if self.paths.is_empty() {
            return None;
        }
        let entries = self.entries().await;
        let entry = entries.iter().find(|entry| entry.is_for(registry, repository_path))?;
        Some(Login { secret: entry.secret.clone(), source: Source::DockerConfig(entry.file.clone()) })
    }

    async fn entries(&self) -> Arc<[Entry]> {
        let read = || self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, entries)) = read().as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            return entries.clone();
        }
        let paths = self.paths.clone();
        let all = move || paths.iter().flat_map(|path| load(path)).collect::<Vec<_>>();
        let entries: Arc<[Entry]> = tokio::task::spawn_blocking(all).await.unwrap_or_default().into();
        *read() = Some((Instant::now(), entries.clone()));
        entries
    }
}

/// One file's entries. A file that can't be read gives none, as with the kubelet: it must not
/// stand in the way of images that need no credentials.
fn load(path: &Path) -> Vec<Entry> {
    let Ok(bytes) = read_file(path) else { return Vec::new() };
    // serde_json's own text could quote the file.
    let Ok(file) = serde_json::from_slice::<File>(&bytes) else {
        tracing::warn!(path = %path.display(), "not a Docker configuration: its credentials are not used");
        return Vec::new();
    };
    let mut entries: Vec<_> = file
        .auths
        .into_iter()
        .filter_map(|(key, auth)| {
            let (host, path_prefix) = split_key(&key);
            let secret = auth.secret()?;
            Some(Entry { host, path: path_prefix, secret, file: path.to_owned() })
        })
        .collect();
    // Longest path first; of hosts, those without a glob.
    entries.sort_by_key(|entry| (std::cmp::Reverse(entry.path.len()), entry.host.contains('*')));
    entries
}

impl Auth {
    fn secret(self) -> Option<Secret> {
        if !self.identity_token.is_empty() {
            Some(Secret::Identity(self.identity_token))
        } else if !self.username.is_empty() {
            Some(Secret::Basic { user: self.username, password: self.password })
        } else if !self.auth.is_empty() {
            decode_basic(&self.auth)
        } else if !self.registry_token.is_empty() {
            Some(Secret::Bearer(self.registry_token))
        } else {
            None
        }
    }
}

/// `https://index.docker.io/v1/` is a host; `host/team` a host and a path.
fn split_key(key: &str) -> (String, String) {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let path = path.trim_matches('/');
    let path = match path.split_once('/') {
        Some(("v1" | "v2", rest)) => rest,
        None if matches!(path, "v1" | "v2") => "",
        _ => path,
    };
    (canonical(host).to_owned(), path.trim_matches('/').to_owned())
}

/// Docker Hub has many names.
fn canonical(host: &str) -> &str {
    match host {
        "index.docker.io" | "registry-1.docker.io" | "registry.hub.docker.com" => "docker.io",
        host => host,
    }
}

impl Entry {
    fn is_for(&self, registry: &str, repository_path: &str) -> bool {
        let in_path = self.path.is_empty()
            || repository_path
                .strip_prefix(&self.path)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        in_path && host_matches(&self.host, registry)
    }
}

/// Label by label, as many labels; the port must be the same.
fn host_matches(pattern: &str, registry: &str) -> bool {
    if !pattern.contains('*') {
        return pattern == registry;
    }
    let split = |text: &str| match text.rsplit_once(':') {
        Some((host, port)) => (host.to_owned(), port.to_owned()),
        None => (text.to_owned(), String::new()),
    };
    let ((pattern, pattern_port), (host, port)) = (split(pattern), split(registry));
    let (patterns, labels): (Vec<_>, Vec<_>) = (pattern.split('.').collect(), host.split('.').collect());
    pattern_port == port
        && patterns.len() == labels.len()
        && patterns.iter().zip(&labels).all(|(pattern, label)| label_matches(pattern, label))
}

/// `*` stands for any run of characters within one label.
fn label_matches(pattern: &str, label: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else { return pattern == label };
    let Some(rest) = label.strip_prefix(head) else { return false };
    (0..=rest.len()).any(|at| rest.get(at..).is_some_and(|rest| label_matches(tail, rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configs(texts: &[&str]) -> (tempfile::TempDir, DockerConfigs) {
        let directory = tempfile::tempdir().unwrap();
        let paths = texts.iter().enumerate().map(|(number, text)| {
            let path = directory.path().join(number.to_string());
            std::fs::write(&path, text).unwrap();
            path
        });
        let configs = DockerConfigs::new(paths.collect());
        (directory, configs)
    }

    async fn user(configs: &DockerConfigs, registry: &str, path: &str) -> Option<String> {
        match configs.login(registry, path).await?.secret {
            Secret::Basic { user, .. } => Some(user),
            _ => None,
        }
    }

    #[tokio::test]
    async fn keys_match_as_the_kubelet_does() {
        for (key, registry, path, expected) in [
            ("host.io", "host.io", "a", true),
            ("https://host.io/v1/", "host.io", "a", true),
            ("https://host.io/v2/", "host.io", "a/b", true),
            ("http://host.io", "host.io", "a", true),
            ("https://index.docker.io/v1/", "docker.io", "library/busybox", true),
            ("docker.io", "docker.io", "library/busybox", true),
            ("host.io:5000", "host.io:5000", "a", true),
            ("host.io", "host.io:5000", "a", false),
            ("host.io:5000", "host.io", "a", false),
            ("*.host.io", "eu.host.io", "a", true),
            ("*.host.io", "host.io", "a", false),
            ("*.host.io", "a.b.host.io", "a", false),
            ("*.host.io", "eu.host.io.evil.io", "a", false),
            ("app*.host.io", "app1.host.io", "a", true),
            ("*.host.io:5000", "eu.host.io:5000", "a", true),
            ("*.host.io:5000", "eu.host.io", "a", false),
            ("host.io/team", "host.io", "team", true),
            ("host.io/team", "host.io", "team/app", true),
            ("host.io/team", "host.io", "team-b/app", false),
            ("host.io/team", "host.io", "other", false),
            ("https://host.io/v1/team", "host.io", "team/app", true),
            ("host.io", "host.io.evil.io", "a", false),
            ("host.io", "evil-host.io", "a", false),
        ] {
            let text = serde_json::json!({"auths": {key: {"username": "u", "password": "p"}}}).to_string();
            let (_directory, configs) = configs(&[&text]);
            assert_eq!(user(&configs, registry, path).await.is_some(), expected, "{key}: {registry}/{path}");
        }
    }

    #[tokio::test]
    async fn the_most_specific_key_of_the_first_file_wins() {
        let first = r#"{"auths": {
            "*.host.io": {"username": "glob"}, "eu.host.io": {"username": "host"},
            "eu.host.io/team": {"username": "team"}}}"#;
        let second =
            r#"{"auths": {"eu.host.io/team/app": {"username": "second"}, "x.io": {"username": "x"}}}"#;
        let (_directory, configs) = configs(&[first, second]);
        assert_eq!(user(&configs, "us.host.io", "a").await.as_deref(), Some("glob"));
        assert_eq!(user(&configs, "eu.host.io", "a").await.as_deref(), Some("host"));
        assert_eq!(user(&configs, "eu.host.io", "team/app").await.as_deref(), Some("team"));
        assert_eq!(user(&configs, "x.io", "a").await.as_deref(), Some("x"));
    }

    #[tokio::test]
    async fn auth_is_base64_and_a_broken_file_is_passed_over() {
        let good = r#"{"auths": {"host.io": {"auth": "dTpw"}, "empty.io": {}}, "credsStore": "pass"}"#;
        let (_directory, configs) = configs(&["{", good]);
        assert_eq!(user(&configs, "host.io", "a").await.as_deref(), Some("u"));
        assert!(configs.login("empty.io", "a").await.is_none());
        let missing = DockerConfigs::new(vec!["/nonexistent/config.json".into()]);
        assert!(missing.login("host.io", "a").await.is_none());
    }
}
