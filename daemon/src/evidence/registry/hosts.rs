//! Which hosts are asked for a registry: containerd's `certs.d/<registry>/hosts.toml`.
//!
//! Reads what containerd reads (`core/remotes/docker/config/hosts.go`, `config_unix.go`), so
//! that evidence comes from where the image will come from. One difference, on purpose: where
//! a hosts.toml can't be read, containerd logs it and goes on without; here it is a failure
//! that names the file and the line, since an operator who configured a mirror or a CA would
//! otherwise be told about a host that they never meant to be asked.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use tokio::time::Instant;
use url::Url;

use super::tls::Tls;
use crate::verdict::{Failure, FailureReason};

/// A changed file is seen after this long at the latest.
const FRESH: Duration = Duration::from_secs(5);
/// Registries remembered; past it all are read again.
const REMEMBERED: usize = 256;
/// Larger files are not configuration.
const LARGEST_FILE: u64 = 1 << 20;

/// One host that serves a registry's content: a mirror, or the registry itself.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    /// Scheme, host, port; no path.
    pub(super) base: Url,
    /// The root of the API on that host: `/v2`, or what `override_path` says.
    pub(super) path: String,
    /// By digest (`pull`).
    pub(super) pulls: bool,
    /// By tag (`resolve`).
    pub(super) resolves: bool,
    /// Static headers of the configuration.
    pub(super) headers: HeaderMap,
    /// Trust roots, client certificate, connect time limit.
    pub(super) tls: Arc<Tls>,
    /// Configured for http, but with TLS settings: https is tried first, as containerd does.
    pub(super) https_first: bool,
    /// Another host than the reference names: it is told which registry is meant (`?ns=`).
    pub(super) is_mirror: bool,
}

impl Endpoint {
    /// Whether nothing can be had of `other` that this one does not give.
    fn stands_for(&self, other: &Self) -> bool {
        let able = self.pulls && self.resolves;
        able && (&self.base, &self.path) == (&other.base, &other.path)
    }

    /// The address of `what` (`manifests/latest`) in the repository `repository_path`.
    pub(super) fn url(&self, registry: &str, repository_path: &str, what: &str) -> Url {
        let mut url = self.base.clone();
        let parts = [self.path.as_str(), repository_path, what].map(|part| part.trim_matches('/'));
        let joined: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        url.set_path(&joined.join("/"));
        if self.is_mirror {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        url
    }

    /// Whether the node's own credentials (ECR, docker configuration) may be used here: not at a
    /// mirror that would hear them in the clear over a network.
    pub(super) fn may_know_the_node(&self) -> bool {
        !self.is_mirror || self.base.scheme() == "https" || self.base.host_str().is_some_and(is_localhost)
    }
}

/// The configured hosts, read from `certs.d` and remembered for a few seconds.
#[derive(Debug)]
pub(super) struct Hosts {
    root: PathBuf,
    known: Mutex<HashMap<(String, bool), Known>>,
}

#[derive(Debug)]
struct Known {
    read_at: Instant,
    endpoints: Arc<[Endpoint]>,
}

impl Hosts {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root, known: Mutex::default() }
    }

    /// The hosts of `registry` (host and port as in the reference), in the order to ask them.
    /// `plain_http` makes the registry itself, if nothing is configured for it, an http host.
    ///
    /// # Errors
    /// `registry-unavailable`, naming the file, when the configuration can't be read.
    pub(super) async fn of(&self, registry: &str, plain_http: bool) -> Result<Arc<[Endpoint]>, Failure> {
        let key = (registry.to_owned(), plain_http);
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = known().get(&key).filter(|entry| entry.read_at.elapsed() < FRESH) {
            return Ok(entry.endpoints.clone());
        }
        let (root, name) = (self.root.clone(), registry.to_owned());
        let endpoints: Arc<[Endpoint]> = tokio::task::spawn_blocking(move || read(&root, &name, plain_http))
            .await
            .map_err(|_| unreadable("the registry hosts configuration could not be read"))??
            .into();
        let mut known = known();
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(key, Known { read_at: Instant::now(), endpoints: endpoints.clone() });
        Ok(endpoints)
    }
}

/// One host as it is written, before the defaults: containerd's `hostConfig`.
#[derive(Debug, Default)]
struct Written {
    /// `None` is the registry itself.
    server: Option<Server>,
    pulls: bool,
    resolves: bool,
    headers: HeaderMap,
    ca: Vec<PathBuf>,
    client: Vec<(PathBuf, Option<PathBuf>)>,
    skip_verify: Option<bool>,
    dial_timeout: Option<Duration>,
}

/// A `server` or `host` of the file.
#[derive(Debug)]
struct Server {
    base: Url,
    path: String,
    /// `:80` is written: http, without doubt. A URL does not remember its default port.
    is_port_80: bool,
}

/// `ConfigureHosts` in hosts.go.
fn read(root: &Path, registry: &str, plain_http: bool) -> Result<Vec<Endpoint>, Failure> {
    let written = match directory(root, registry)? {
        Some(directory) => load(&directory)?,
        None => vec![Written::default()],
    };
    let mut endpoints: Vec<Endpoint> =
        written.into_iter().map(|host| endpoint(host, registry, plain_http)).collect::<Result<_, _>>()?;
    // `server` is often written as a `[host]`, too. Asking it twice would step over its
    // Retry-After, and tell of the second answer instead of the first.
    if let Some((last, hosts)) = endpoints.split_last()
        && hosts.iter().any(|host| host.stands_for(last))
    {
        endpoints.pop();
    }
    Ok(endpoints)
}

/// `HostDirFromRoot` and `hostPaths`: `host_port_`, `host`, `_default`.
fn directory(root: &Path, registry: &str) -> Result<Option<PathBuf>, Failure> {
    if registry.contains(['/', '\\']) || registry.starts_with('.') {
        return Ok(None);
    }
    let with_port = registry.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    for name in with_port.as_deref().into_iter().chain([registry, "_default"]) {
        let path = root.join(name);
        match std::fs::metadata(&path) {
            Ok(_) => return Ok(Some(path)),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(cannot_read(&path, error.kind())),
        }
    }
    Ok(None)
}

/// `loadHostDir`: hosts.toml, or the certificates that lie there.
fn load(directory: &Path) -> Result<Vec<Written>, Failure> {
    let path = directory.join("hosts.toml");
    match read_file(&path) {
        Ok(bytes) if !bytes.is_empty() => parse(&path, &bytes),
        Ok(_) => load_certificates(directory),
        Err(ErrorKind::NotFound) => load_certificates(directory),
        Err(kind) => Err(cannot_read(&path, kind)),
    }
}

/// `loadCertFiles`: Docker's layout, `*.crt` for CAs, `*.cert` and `*.key` for the client.
fn load_certificates(directory: &Path) -> Result<Vec<Written>, Failure> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(vec![Written::default()]),
        Err(error) => return Err(cannot_read(directory, error.kind())),
    };
    let mut paths: Vec<_> =
        entries.flatten().map(|entry| entry.path()).filter(|path| !path.is_dir()).collect();
    paths.sort();
    let mut host = Written::default();
    for path in paths {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => host.ca.push(path),
            Some("cert") => {
                let key = path.with_extension("key");
                host.client.push((path, key.exists().then_some(key)));
            }
            _ => {}
        }
    }
    Ok(vec![host])
}

/// `hostFileConfig`. Unknown keys are ignored, as containerd does: newer files must work.
#[derive(Deserialize, Default)]
struct HostTable {
    #[serde(default)]
    capabilities: Vec<String>,
    ca: Option<OneOrMany<String>>,
    client: Option<OneOrMany<OneOrMany<String>>>,
    skip_verify: Option<bool>,
    #[serde(default)]
    header: HashMap<String, OneOrMany<String>>,
    #[serde(default)]
    override_path: bool,
    #[serde(default)]
    dial_timeout: String,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    server: String,
    /// In the order of the file (`getSortedHosts`).
    #[serde(default)]
    host: toml::map::Map<String, toml::Value>,
    #[serde(flatten)]
    root: HostTable,
}

#[derive(Deserialize, Debug)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// `parseHostsFile`: the `[host]` tables in order, then the root table as the last one.
fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<Written>, Failure> {
    let text = std::str::from_utf8(bytes).map_err(|_| malformed(path, None, "it is not UTF-8 text"))?;
    let file: File = toml::from_str(text)
        .map_err(|error| malformed(path, error.span().map(|span| line(text, span.start)), error.message()))?;
    let mut hosts = Vec::with_capacity(file.host.len() + 1);
    for (name, table) in file.host {
        let at = text.find(&name).map(|offset| line(text, offset));
        let table = HostTable::deserialize(table).map_err(|error| malformed(path, at, error.message()))?;
        hosts.push(written(&name, table, path).map_err(|why| malformed(path, at, &why))?);
    }
    let at = Some(file.server.as_str())
        .filter(|server| !server.is_empty())
        .and_then(|server| text.find(server))
        .map(|offset| line(text, offset));
    hosts.push(written(&file.server, file.root, path).map_err(|why| malformed(path, at, &why))?);
    Ok(hosts)
}

/// `parseHostConfig`.
fn written(server: &str, table: HostTable, path: &Path) -> Result<Written, String> {
    let beside = |name: String| path.parent().unwrap_or(Path::new("/")).join(name);
    let mut host = Written { skip_verify: table.skip_verify, ..Written::default() };
    if !server.is_empty() {
        host.server = Some(parse_server(server, table.override_path)?);
    }
    let all = table.capabilities.is_empty();
    (host.pulls, host.resolves) = (all, all);
    for capability in &table.capabilities {
        match capability.to_ascii_lowercase().as_str() {
            "pull" => host.pulls = true,
            "resolve" => host.resolves = true,
            "push" | "referrers" => {}
            _ => return Err(format!("unknown capability `{capability}`")),
        }
    }
    host.ca = table.ca.map(OneOrMany::into_vec).unwrap_or_default().into_iter().map(beside).collect();
    for pair in table.client.map(OneOrMany::into_vec).unwrap_or_default() {
        let mut pair = match pair {
            OneOrMany::One(both) => vec![both],
            OneOrMany::Many(pair) if pair.len() == 2 => pair,
            OneOrMany::Many(_) => return Err("`client` must hold files or [certificate, key] pairs".into()),
        }
        .into_iter()
        .map(beside);
        if let Some(certificate) = pair.next() {
            host.client.push((certificate, pair.next()));
        }
    }
    host.headers = headers(table.header)?;
    if !table.dial_timeout.is_empty() {
        let timeout = humantime::parse_duration(&table.dial_timeout);
        host.dial_timeout = Some(timeout.map_err(|_| "`dial_timeout` is not a duration such as \"3s\"")?);
    }
    Ok(host)
}

/// The address without path, and the root of the API.
fn parse_server(server: &str, override_path: bool) -> Result<Server, String> {
    let has_scheme = server.starts_with("http://") || server.starts_with("https://");
    let text = if has_scheme { server.to_owned() } else { format!("https://{server}") };
    // The text may hold a password: it is not repeated.
    let url = Url::parse(&text).map_err(|_| "a host is not a URL such as \"https://mirror.example.com\"")?;
    let host = url.host_str().ok_or("a host has no name")?;
    let path = url.path().trim_end_matches('/');
    let path = if override_path || path.ends_with("/v2") { path.to_owned() } else { format!("{path}/v2") };
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let base = Url::parse(&format!("{}://{host}{port}/", url.scheme())).map_err(|_| "a host is not a URL")?;
    let authority = text.split('/').nth(2).unwrap_or_default();
    Ok(Server { base, path, is_port_80: authority.ends_with(":80") })
}

fn headers(table: HashMap<String, OneOrMany<String>>) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, values) in table {
        let key = HeaderName::try_from(&name).map_err(|_| format!("`{name}` can't be a header's name"))?;
        for value in values.into_vec() {
            let mut value = HeaderValue::try_from(value)
                .map_err(|_| format!("the header `{name}` has a value that can't be sent"))?;
            value.set_sensitive(true);
            headers.append(key.clone(), value);
        }
    }
    Ok(headers)
}

/// The defaults of `ConfigureHosts`, and whether https is tried before http.
fn endpoint(mut host: Written, registry: &str, plain_http: bool) -> Result<Endpoint, Failure> {
    let Server { base, path, is_port_80 } = match host.server.take() {
        Some(server) => server,
        None => {
            (host.pulls, host.resolves) = (true, true);
            let base = default_base(&mut host, registry, plain_http)?;
            Server { base, path: "/v2".to_owned(), is_port_80: port(registry) == Some("80") }
        }
    };
    let has_tls = !host.ca.is_empty() || !host.client.is_empty() || host.skip_verify.is_some();
    let https_first = base.scheme() == "http" && has_tls && !is_port_80;
    let skip_verify = host.skip_verify.unwrap_or(false);
    let tls = Tls::read(&host.ca, host.client.first(), skip_verify, host.dial_timeout)?;
    let is_mirror = !is_registry_itself(&base, registry);
    Ok(Endpoint {
        base,
        path,
        pulls: host.pulls,
        resolves: host.resolves,
        headers: host.headers,
        tls: Arc::new(tls),
        https_first,
        is_mirror,
    })
}

/// The registry's own address where no `server` is written.
fn default_base(host: &mut Written, registry: &str, plain_http: bool) -> Result<Url, Failure> {
    let (scheme, name) = if registry == "docker.io" {
        ("https", "registry-1.docker.io")
    } else if plain_http {
        ("http", registry)
    } else if is_localhost(registry) {
        let port = port(registry);
        if port != Some("80") {
            host.skip_verify = Some(true);
        }
        (if matches!(port, None | Some("443")) { "https" } else { "http" }, registry)
    } else {
        ("https", registry)
    };
    Url::parse(&format!("{scheme}://{name}/"))
        .map_err(|_| unreadable(&format!("`{registry}` can't be the address of a registry")))
}

/// `RegistryHost.isProxy`, the other way round. Default ports are not written in a URL's host.
pub(super) fn is_registry_itself(base: &Url, registry: &str) -> bool {
    let written = |port: Option<u16>| match (base.host_str(), port) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (host, _) => host.unwrap_or_default().to_owned(),
    };
    let (short, long) = (written(base.port()), written(base.port_or_known_default()));
    registry == short || registry == long || registry == "docker.io" && short == "registry-1.docker.io"
}

fn port(registry: &str) -> Option<&str> {
    registry.rsplit_once(':').map(|(_, port)| port).filter(|port| port.bytes().all(|b| b.is_ascii_digit()))
}

/// `docker.IsLocalhost`.
fn is_localhost(registry: &str) -> bool {
    let host = match port(registry) {
        Some(port) => registry.strip_suffix(port).and_then(|host| host.strip_suffix(':')).unwrap_or(registry),
        None => registry,
    };
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// A small file, whole.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>, ErrorKind> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|error| error.kind())?;
    file.take(LARGEST_FILE + 1).read_to_end(&mut bytes).map_err(|error| error.kind())?;
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(ErrorKind::FileTooLarge);
    }
    Ok(bytes)
}

pub(super) fn cannot_read(path: &Path, kind: ErrorKind) -> Failure {
    unreadable(&format!("{} can't be read: {kind}", path.display()))
}

fn malformed(path: &Path, line: Option<usize>, why: &str) -> Failure {
    let line = line.map(|line| format!(":{line}")).unwrap_or_default();
    unreadable(&format!("{}{line} is malformed: {}", path.display(), why.replace('\n', ", ")))
}

fn unreadable(what: &str) -> Failure {
    FailureReason::RegistryUnavailable.because(what)
}

fn line(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|&byte| byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    struct CertsD(tempfile::TempDir);

    impl CertsD {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn with(self, file: &str, text: &str) -> Self {
            let path = self.0.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
            self
        }

        fn read(&self, registry: &str) -> Result<Vec<Endpoint>, Failure> {
            read(self.0.path(), registry, false)
        }

        /// `scheme://host[:port]/path` of each host, and `*` where https goes first.
        fn roots(&self, registry: &str) -> Vec<String> {
            let endpoints = self.read(registry).unwrap();
            let root = |e: &Endpoint| {
                format!(
                    "{}{}{}",
                    e.base.as_str().trim_end_matches('/'),
                    e.path,
                    if e.https_first { " *" } else { "" }
                )
            };
            endpoints.iter().map(root).collect()
        }
    }

    #[test]
    fn without_configuration_the_registry_itself_is_asked() {
        for (registry, root) in [
            ("docker.io", "https://registry-1.docker.io/v2"),
            ("ghcr.io", "https://ghcr.io/v2"),
            ("host:5000", "https://host:5000/v2"),
            ("localhost", "https://localhost/v2"),
            ("localhost:443", "https://localhost/v2"),
            ("localhost:80", "http://localhost/v2"),
            ("localhost:5000", "http://localhost:5000/v2 *"),
            ("127.0.0.1:5000", "http://127.0.0.1:5000/v2 *"),
            ("127.8.9.10:5000", "http://127.8.9.10:5000/v2 *"),
            ("[::1]:5000", "http://[::1]:5000/v2 *"),
            ("128.0.0.1:5000", "https://128.0.0.1:5000/v2"),
            ("localhost.evil.io:5000", "https://localhost.evil.io:5000/v2"),
        ] {
            assert_eq!(CertsD::new().roots(registry), [root], "{registry}");
        }
    }

    #[test]
    fn plain_http_is_for_the_registry_itself() {
        let empty = tempfile::tempdir().unwrap();
        let [endpoint] = &read(empty.path(), "registry.local:5000", true).unwrap()[..] else { panic!() };
        assert_eq!(endpoint.base.as_str(), "http://registry.local:5000/");
        assert!(!endpoint.https_first && !endpoint.is_mirror);
    }

    #[test]
    fn directories_are_tried_with_port_then_host_then_default() {
        let server = |name: &str| format!("server = 'https://{name}'");
        let all = CertsD::new()
            .with("host_5000_/hosts.toml", &server("one"))
            .with("host:5000/hosts.toml", &server("two"))
            .with("_default/hosts.toml", &server("three"));
        assert_eq!(all.roots("host:5000"), ["https://one/v2"]);
        assert_eq!(all.roots("host"), ["https://three/v2"]);
        let colon = CertsD::new()
            .with("host:5000/hosts.toml", &server("two"))
            .with("_default/hosts.toml", &server("three"));
        assert_eq!(colon.roots("host:5000"), ["https://two/v2"]);
        assert!(directory(colon.0.path(), "../host:5000").unwrap().is_none());
    }

    #[test]
    fn hosts_keep_the_order_of_the_file_and_the_server_is_last() {
        let certs_d = CertsD::new().with(
            "docker.io/hosts.toml",
            r#"
            server = "https://upstream.example.com"
            [host."https://zz.example.com"]
            [host."http://10.0.0.1:8080/mirror/"]
            [host."aa.example.com:8443"]
            [host."https://harbor.example.com/v2/proxy"]
              override_path = true
            [host."https://plain.example.com"]
              override_path = true
              [host."https://plain.example.com".header]
                x-one = "1"
            "#,
        );
        assert_eq!(
            certs_d.roots("docker.io"),
            [
                "https://zz.example.com/v2",
                "http://10.0.0.1:8080/mirror/v2",
                "https://aa.example.com:8443/v2",
                "https://harbor.example.com/v2/proxy",
                "https://plain.example.com",
                "https://upstream.example.com/v2",
            ]
        );
    }

    #[test]
    fn without_server_the_registry_itself_is_last_with_every_capability() {
        let certs_d = CertsD::new().with(
            "docker.io/hosts.toml",
            "capabilities = ['push']\n[host.'https://mirror.example.com']\ncapabilities = ['pull']\n",
        );
        let [mirror, own] = &certs_d.read("docker.io").unwrap()[..] else { panic!() };
        assert!(mirror.pulls && !mirror.resolves && mirror.is_mirror);
        assert!(own.pulls && own.resolves && !own.is_mirror);
        assert_eq!(own.base.as_str(), "https://registry-1.docker.io/");
    }

    #[test]
    fn a_server_that_is_a_host_too_is_asked_once() {
        let twice = |host: &str| {
            let text = format!("server = 'https://one'\n[host.'https://two']\n[host.'https://one'{host}");
            CertsD::new().with("host/hosts.toml", &text).roots("host")
        };
        assert_eq!(twice("]\nskip_verify = true\n"), ["https://two/v2", "https://one/v2"]);
        let only_pulls = twice("]\ncapabilities = ['pull']\n");
        assert_eq!(only_pulls, ["https://two/v2", "https://one/v2", "https://one/v2"]);
    }

    #[test]
    fn mirrors_are_told_which_registry_is_meant() {
        let certs_d = CertsD::new().with("quay.io/hosts.toml", "[host.'https://mirror.example.com']");
        let [mirror, own] = &certs_d.read("quay.io").unwrap()[..] else { panic!() };
        assert_eq!(
            mirror.url("quay.io", "team/app", "manifests/v1").as_str(),
            "https://mirror.example.com/v2/team/app/manifests/v1?ns=quay.io"
        );
        assert_eq!(
            own.url("quay.io", "team/app", "manifests/v1").as_str(),
            "https://quay.io/v2/team/app/manifests/v1"
        );
    }

    #[test]
    fn http_with_tls_settings_tries_https_first_unless_the_port_is_80() {
        for (host, expected) in [
            ("http://10.0.0.1:5000", true),
            ("http://10.0.0.1", true),
            ("http://10.0.0.1:80", false),
            ("https://10.0.0.1:5000", false),
        ] {
            let text = format!("server = '{host}'\nskip_verify = true\n");
            let certs_d = CertsD::new().with("host/hosts.toml", &text);
            assert_eq!(certs_d.read("host").unwrap()[0].https_first, expected, "{host}");
        }
        let certs_d = CertsD::new().with("host/hosts.toml", "server = 'http://10.0.0.1:5000'");
        assert!(!certs_d.read("host").unwrap()[0].https_first);
    }

    #[test]
    fn headers_may_be_one_or_many_and_are_not_shown() {
        let certs_d = CertsD::new().with(
            "host/hosts.toml",
            "[host.'https://m']\n[host.'https://m'.header]\nx-key = 'sesame'\nx-many = ['a', 'b']\n",
        );
        let endpoints = certs_d.read("host").unwrap();
        assert_eq!(endpoints[0].headers.get_all("x-many").iter().count(), 2);
        assert_eq!(endpoints[0].headers.get("x-key").unwrap(), "sesame");
        assert!(!format!("{endpoints:?}").contains("sesame"));
    }

    #[test]
    fn a_malformed_file_is_a_failure_with_file_and_line() {
        for (text, line, why) in [
            ("server = 'https://a'\n[host\n", 2, ""),
            ("\n\nserver = 3\n", 3, "string"),
            ("[host.'https://m']\ncapabilities = ['fly']\n", 1, "unknown capability `fly`"),
            ("[host.'https://m']\nclient = [['a', 'b', 'c']]\n", 1, "`client`"),
            ("[host.'https://m']\ndial_timeout = 'soon'\n", 1, "`dial_timeout`"),
            ("server = 'https://user:hunter2@'\n", 1, "not a URL"),
        ] {
            let certs_d = CertsD::new().with("host/hosts.toml", text);
            let failure = certs_d.read("host").unwrap_err();
            assert_eq!(failure.reason, FailureReason::RegistryUnavailable);
            let place = format!("{}/host/hosts.toml:{line} is malformed", certs_d.0.path().display());
            assert!(failure.found.starts_with(&place) && failure.found.contains(why), "{}", failure.found);
            assert!(!failure.found.contains("hunter2") && !failure.found.contains('\n'), "{}", failure.found);
        }
    }

    #[test]
    fn a_missing_ca_is_a_failure_that_names_it() {
        let certs_d = CertsD::new().with("host/hosts.toml", "server = 'https://a'\nca = 'ca.pem'\n");
        let found = certs_d.read("host").unwrap_err().found;
        assert!(found.contains("/host/ca.pem can't be read"), "{found}");
    }

    #[test]
    fn unknown_keys_are_ignored_as_containerd_does() {
        let certs_d = CertsD::new().with("host/hosts.toml", "server = 'https://a'\nfuture = 1\n");
        assert_eq!(certs_d.roots("host"), ["https://a/v2"]);
    }

    #[tokio::test]
    async fn a_changed_file_is_seen_within_seconds() {
        let certs_d = CertsD::new().with("host/hosts.toml", "server = 'https://one'");
        let hosts = Hosts::new(certs_d.0.path().to_owned());
        assert_eq!(hosts.of("host", false).await.unwrap()[0].base.host_str(), Some("one"));
        let certs_d = certs_d.with("host/hosts.toml", "server = 'https://two'");
        assert_eq!(hosts.of("host", false).await.unwrap()[0].base.host_str(), Some("one"));
        hosts.known.lock().unwrap().values_mut().for_each(|known| known.read_at -= FRESH);
        assert_eq!(hosts.of("host", false).await.unwrap()[0].base.host_str(), Some("two"));
        drop(certs_d);
    }
}
