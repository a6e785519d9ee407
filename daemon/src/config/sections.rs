//! Reads everything but the rules, and checks what concerns several fields.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::problem::Complaint;
use super::reader::{self, Section};
use super::yaml::{Data, Node, shortened};
use super::{
    Aws, Cache, Config, Containerd, DefaultAction, Limits, MetricsListen, Policy, RegionEndpoints,
    RegistryAccess, RuntimeService, rule,
};

/// Reads the whole file; what it gives counts only if nothing was reported.
pub(super) fn config(top: &Section<'_>) -> Config {
    mode(top);
    let services = [("refuse", RuntimeService::Refuse), ("passThrough", RuntimeService::PassThrough)];
    let actions = [("deny", DefaultAction::Deny), ("allow", DefaultAction::Allow)];
    let (containerd_section, metrics_section) = (top.section("containerd"), top.section("metrics"));
    let config = Config {
        listen: top.socket("listen").unwrap_or_default(),
        admin: top.socket("admin").unwrap_or_default(),
        state_dir: top.absolute("stateDir"),
        containerd: containerd(&containerd_section),
        runtime_service: top.choice("runtimeService", &services).unwrap_or(RuntimeService::Refuse),
        allowed_uids: top.list("allowedUIDs", uid),
        metrics: metrics(&metrics_section),
        cache: cache(&top.section("cache")),
        deadline: top.duration("deadline"),
        image_status_deadline: top.duration("imageStatusDeadline"),
        limits: limits(&top.section("limits")),
        registry: registry(&top.section("registry")),
        aws: aws(&top.section("aws")),
        default: top.choice("default", &actions).unwrap_or(DefaultAction::Deny),
        policy: Policy::new(rule::read(&top.sections("verificationRules"))),
    };
    sockets(top, &containerd_section, &metrics_section, &config);
    users(top, &config);
    defaults(top, &config);
    if config.image_status_deadline > config.deadline {
        top.warning(
            "imageStatusDeadline",
            Complaint::new("an ImageStatus call waits longer than a pull does")
                .help("make it shorter than deadline"),
        );
    }
    config
}

fn mode(top: &Section<'_>) {
    top.text("mode", |mode| match mode {
        "enforce" => Ok(()),
        "dryRun" => {
            Err(Complaint::new("`dryRun` is not in this version").help("write enforce, or remove the line"))
        }
        other => Err(Complaint::new(format!("`{}` is not a mode", shortened(other)))
            .help("write enforce, or remove the line")),
    });
}

fn containerd(section: &Section<'_>) -> Containerd {
    let address = section.socket("address").unwrap_or_default();
    let namespace = |text: &str| {
        let good = text
            .split(['.', '_', '-'])
            .all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()));
        match good && text.len() <= 76 {
            true => Ok(text.to_owned()),
            false => Err(Complaint::new(format!("`{}` is not a containerd namespace", shortened(text)))
                .help("Kubernetes uses k8s.io")),
        }
    };
    Containerd {
        image_endpoint: section.socket("imageEndpoint").unwrap_or_else(|| address.clone()),
        address,
        namespace: section.text("namespace", namespace).unwrap_or_default(),
        registry_config_path: section.absolute("registryConfigPath"),
    }
}

fn metrics(section: &Section<'_>) -> MetricsListen {
    let listen = section.text("listen", metrics_listen).unwrap_or(MetricsListen::Off);
    if let MetricsListen::Tcp(address) = &listen {
        if !address.ip().is_loopback() {
            section.warning(
                "listen",
                Complaint::new(format!("everybody who reaches {address} can read the metrics"))
                    .help("use 127.0.0.1 or a unix:// socket, unless a firewall guards the port"),
            );
        }
        if address.port() == 0 {
            section.warning(
                "listen",
                Complaint::new("port 0 is another port at each start").help("name a port"),
            );
        }
    }
    listen
}

fn metrics_listen(text: &str) -> Result<MetricsListen, Complaint> {
    if text == "off" {
        return Ok(MetricsListen::Off);
    }
    if let Some(path) = text.strip_prefix("unix://") {
        return reader::socket(path).map(MetricsListen::Unix);
    }
    text.parse::<SocketAddr>().map(MetricsListen::Tcp).map_err(|_| {
        let complaint = Complaint::new(format!("`{}` is not an address to listen on", shortened(text)));
        match text.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>())) {
            Some(("localhost" | "", Ok(port))) => complaint.help(format!("write 127.0.0.1:{port}")),
            _ => complaint.help("write IP:PORT such as 127.0.0.1:9473, unix:///PATH, or off"),
        }
    })
}

fn cache(section: &Section<'_>) -> Cache {
    let cache = Cache {
        positive_ttl: section.duration("positiveTTL"),
        negative_ttl: section.duration("negativeTTL"),
        stale_grace: section.duration("staleGrace"),
        max_entries: section.count("maxEntries"),
    };
    if cache.negative_ttl > cache.positive_ttl {
        section.warning(
            "negativeTTL",
            Complaint::new("denials are kept longer than permissions")
                .help("a newly signed image is refused for that long; 30s is the default"),
        );
    }
    cache
}

fn limits(section: &Section<'_>) -> Limits {
    Limits {
        concurrent_verifications: section.count("concurrentVerifications"),
        manifest_size: section.size("manifestSize"),
        payload_size: section.size("payloadSize"),
        signatures: section.count("signatures"),
        registry_requests_per_second: section.count("registryRequestsPerSecond"),
        kms_requests_per_second: section.count("kmsRequestsPerSecond"),
    }
}

fn registry(section: &Section<'_>) -> RegistryAccess {
    let docker_configs = section.list("dockerConfigs", |node| reader::absolute(reader::text(node)?));
    RegistryAccess { docker_configs }
}

fn aws(section: &Section<'_>) -> Aws {
    let mut regions = BTreeMap::new();
    for (entry, inner) in section.named("regions") {
        if let Err(complaint) = region(&entry.name) {
            section.error(entry.at, &format!("regions.{}", shortened(&entry.name)), complaint);
        }
        regions.insert(entry.name.clone(), endpoints(&inner));
    }
    let RegionEndpoints { kms_endpoint, ecr_endpoint } = endpoints(section);
    Aws {
        region: section.text("region", region),
        kms_endpoint,
        ecr_endpoint,
        regions,
        replica_regions: section.list("replicaRegions", |node| region(reader::text(node)?)),
        alias_recheck: section.duration("aliasRecheck"),
    }
}

fn endpoints(section: &Section<'_>) -> RegionEndpoints {
    let endpoint = |name: &str| {
        let url = section.url(name)?;
        let local = url.host_str().is_some_and(|h| h == "localhost" || h.starts_with("127.") || h == "[::1]");
        if url.scheme() == "http" && !local {
            section.warning(
                name,
                Complaint::new("whoever is on the way can answer over plain HTTP").help("write https://"),
            );
        }
        Some(url)
    };
    RegionEndpoints { kms_endpoint: endpoint("kmsEndpoint"), ecr_endpoint: endpoint("ecrEndpoint") }
}

fn region(text: &str) -> Result<String, Complaint> {
    let part = |part: &str| !part.is_empty() && part.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9'));
    match text.contains('-') && text.split('-').all(part) {
        true => Ok(text.to_owned()),
        false => Err(Complaint::new(format!("`{}` is not an AWS Region", shortened(text)))
            .help("write a Region such as us-west-2")),
    }
}

fn uid(node: &Node) -> Result<u32, Complaint> {
    u32::try_from(reader::number(node)?).map_err(|_| Complaint::new("user ids have at most 32 bits"))
}

/// No two of our sockets, and none of ours and containerd's, may be one: calls would go in circles.
fn sockets(top: &Section<'_>, containerd: &Section<'_>, metrics: &Section<'_>, config: &Config) {
    let mut sockets: Vec<(&Section<'_>, &str, PathBuf)> = vec![
        (containerd, "address", canonical(&config.containerd.address)),
        (top, "listen", canonical(&config.listen)),
        (top, "admin", canonical(&config.admin)),
    ];
    if config.containerd.image_endpoint != config.containerd.address {
        sockets.insert(1, (containerd, "imageEndpoint", canonical(&config.containerd.image_endpoint)));
    }
    if let MetricsListen::Unix(path) = &config.metrics {
        sockets.push((metrics, "listen", canonical(path)));
    }
    let mut taken: BTreeMap<PathBuf, String> = BTreeMap::new();
    for (section, name, path) in sockets {
        // An empty path is one that was refused already.
        if path.as_os_str().is_empty() {
            continue;
        }
        if let Some(first) = taken.insert(path, section.path(name)) {
            section.error(
                section.place(name),
                name,
                Complaint::new(format!("the same socket as {first}"))
                    .help("give each its own path; calls would go in circles"),
            );
        }
    }
}

/// `/var/run` is `/run` wherever systemd is.
fn canonical(path: &Path) -> PathBuf {
    path.strip_prefix("/var/run").map_or_else(|_| path.to_owned(), |rest| Path::new("/run").join(rest))
}

fn users(top: &Section<'_>, config: &Config) {
    if config.allowed_uids.is_empty() {
        // An item that can't be read has been reported.
        if !matches!(top.entry("allowedUIDs").map(|e| &e.value.data), Some(Data::List(items)) if items.is_empty())
        {
            return;
        }
        let complaint = Complaint::new("nobody could connect").help("write [0]: the kubelet runs as root");
        top.error(top.place("allowedUIDs"), "allowedUIDs", complaint);
    }
}

fn defaults(top: &Section<'_>, config: &Config) {
    let no_rules = match top.entry("verificationRules").map(|entry| &entry.value.data) {
        None | Some(Data::Null) => true,
        Some(Data::List(rules)) => rules.is_empty(),
        Some(_) => false,
    };
    if config.default == DefaultAction::Allow {
        top.warning(
            "default",
            Complaint::new("every image that no rule matches is allowed")
                .help("write deny, and allow rules for what is trusted"),
        );
    } else if no_rules {
        top.error(
            top.place("verificationRules"),
            "verificationRules",
            Complaint::new("there are no rules, so every image would be denied")
                .help("add a rule, such as {imageGlob: registry.k8s.io/**, strategy: allow}"),
        );
    }
}
