//! Every field of the configuration, in one table: the reader takes names, defaults and ranges
//! from here, errors the names that are allowed, and `docs/configuration.md` all of it.

pub use super::markdown::markdown;

/// One field of a mapping.
#[derive(Debug)]
pub struct Field {
    /// The key, in camel case.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// The value where the field is left out, as YAML; empty for none.
    pub default: &'static str,
    /// The least and the greatest value, for durations, sizes and counts.
    pub range: Option<(&'static str, &'static str)>,
    /// What it is for: one sentence.
    pub doc: &'static str,
}

/// What a field takes.
#[derive(Debug)]
pub enum Kind {
    /// Text.
    Text,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// `true` or `false`.
    Flag,
    /// A whole number.
    Count,
    /// A number with a unit of time.
    Duration,
    /// A number with a unit of size.
    Size,
    /// An absolute path.
    Path,
    /// An absolute path of a Unix socket.
    Socket,
    /// An `http` or `https` URL without path.
    Url,
    /// A list of what the words say.
    List(&'static str),
    /// A mapping from annotation names to values.
    Annotations,
    /// A mapping with these fields.
    Section(&'static [Field]),
    /// A mapping from names of one's own choice to mappings with these fields.
    Named(&'static [Field]),
    /// A list of mappings with these fields.
    Rules(&'static [Field]),
}

const fn field(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Field {
    Field { name, kind, default, range: None, doc }
}

impl Field {
    const fn within(mut self, least: &'static str, greatest: &'static str) -> Self {
        self.range = Some((least, greatest));
        self
    }
}

/// The file as a whole.
pub static TOP: &[Field] = &[
    field(
        "listen",
        Kind::Socket,
        "/run/pullgate/pullgate.sock",
        "The socket that the kubelet's `imageServiceEndpoint` names.",
    ),
    field(
        "admin",
        Kind::Socket,
        super::DEFAULT_ADMIN,
        "The socket of `pullgate status`, `pullgate cache` and the like.",
    ),
    field("stateDir", Kind::Path, "/var/lib/pullgate", "Where verdicts and pinned keys are kept."),
    field(
        "mode",
        Kind::Choice(&["enforce"]),
        "enforce",
        "What a denial does: `enforce` refuses the pull. There is no other mode in this version.",
    ),
    field("containerd", Kind::Section(CONTAINERD), "", "Where containerd is."),
    field(
        "runtimeService",
        Kind::Choice(&["refuse", "passThrough"]),
        "refuse",
        "What becomes of CRI RuntimeService calls on the image socket.",
    ),
    field(
        "allowedUIDs",
        Kind::List("user ids"),
        "[0]",
        "Users that may connect to `listen`; the kubelet is 0. The daemon's own user (root) always may.",
    ),
    field("metrics", Kind::Section(METRICS), "", "Where `/metrics`, `/healthz` and `/readyz` are served."),
    field("cache", Kind::Section(CACHE), "", "How long verdicts are kept."),
    field(
        "deadline",
        Kind::Duration,
        "10s",
        "How long a pull waits for a verdict; a verification goes on after it.",
    )
    .within("100ms", "10m"),
    field(
        "imageStatusDeadline",
        Kind::Duration,
        "2s",
        "How long an ImageStatus call waits for a verdict before the image counts as absent.",
    )
    .within("10ms", "2m"),
    field("limits", Kind::Section(LIMITS), "", "What an attacker, or a bad day, may cost this node."),
    field("registry", Kind::Section(REGISTRY), "", "How registries are asked for signatures."),
    field("aws", Kind::Section(AWS), "", "How KMS and ECR are reached; nothing is needed on EC2."),
    field(
        "default",
        Kind::Choice(&["deny", "allow"]),
        "deny",
        "What happens to an image that no rule matches.",
    ),
    field(
        "verificationRules",
        Kind::Rules(RULE),
        "",
        "The rules, in order: the first that matches decides. Required, unless `default` is `allow`.",
    ),
];

/// `containerd`.
pub static CONTAINERD: &[Field] = &[
    field("address", Kind::Socket, "/run/containerd/containerd.sock", "containerd's own socket."),
    field(
        "imageEndpoint",
        Kind::Socket,
        "",
        "The next CRI ImageService, if another proxy (SOCI, stargz, nydus) stands between; else `address`.",
    ),
    field("namespace", Kind::Text, "k8s.io", "The containerd namespace in which the kubelet's images are."),
    field(
        "registryConfigPath",
        Kind::Path,
        "/etc/containerd/certs.d",
        "containerd's `hosts.toml` tree: mirrors and certificates are taken from there.",
    ),
];

/// `metrics`.
pub static METRICS: &[Field] =
    &[field("listen", Kind::Text, "127.0.0.1:9473", "`ADDRESS:PORT`, `unix:///PATH`, or `off`.")];

/// `cache`.
pub static CACHE: &[Field] = &[
    field("positiveTTL", Kind::Duration, "12h", "How long an allowing verdict is used; 0s asks every time.")
        .within("0s", "365d"),
    field(
        "negativeTTL",
        Kind::Duration,
        "30s",
        "How long a denying verdict is used, so how long a new signature may go unseen.",
    )
    .within("0s", "365d"),
    field(
        "staleGrace",
        Kind::Duration,
        "72h",
        "How long past its TTL an allowing verdict stands while registry or KMS are away.",
    )
    .within("0s", "365d"),
    field("maxEntries", Kind::Count, "100000", "How many verdicts are kept.").within("1", "10000000"),
];

/// `limits`.
pub static LIMITS: &[Field] = &[
    field("concurrentVerifications", Kind::Count, "16", "Verifications at one time; others wait.")
        .within("1", "1024"),
    field("manifestSize", Kind::Size, "4MiB", "The largest manifest that is read.").within("1KiB", "64MiB"),
    field("payloadSize", Kind::Size, "1MiB", "The largest signed payload that is read.")
        .within("1KiB", "64MiB"),
    field("signatures", Kind::Count, "64", "Signatures of one image that are looked at.").within("1", "4096"),
    field("registryRequestsPerSecond", Kind::Count, "100", "Requests to registries.").within("1", "100000"),
    field("kmsRequestsPerSecond", Kind::Count, "20", "Requests to KMS, in each Region.")
        .within("1", "100000"),
];

/// `registry`.
pub static REGISTRY: &[Field] = &[field(
    "dockerConfigs",
    Kind::List("absolute paths"),
    "[/var/lib/kubelet/config.json, /root/.docker/config.json]",
    "Docker configuration files with credentials, for calls that bring none; those that don't exist are passed over.",
)];

/// `aws`.
pub static AWS: &[Field] = &[
    field("region", Kind::Text, "", "This node's Region; else the environment's or the instance's."),
    field("kmsEndpoint", Kind::Url, "", "A KMS endpoint other than the Region's own: a VPC endpoint."),
    field("ecrEndpoint", Kind::Url, "", "The same for ECR."),
    field(
        "replicaRegions",
        Kind::List("Regions"),
        "[]",
        "Regions that hold replicas of multi-Region keys, in the order to try them.",
    ),
    field("regions", Kind::Named(REGION), "", "Endpoints for single Regions, by Region."),
    field(
        "aliasRecheck",
        Kind::Duration,
        "5m",
        "How long until a key's alias is compared with KMS again; 0s compares at every use.",
    )
    .within("0s", "24h"),
];

/// `aws.regions.REGION`.
pub static REGION: &[Field] = &[
    field("kmsEndpoint", Kind::Url, "", "The KMS endpoint for this Region."),
    field("ecrEndpoint", Kind::Url, "", "The ECR endpoint for this Region."),
];

/// One of `verificationRules`.
pub static RULE: &[Field] = &[
    field("name", Kind::Text, "", "What messages, journal and metrics call the rule; else its `imageGlob`."),
    field("imageGlob", Kind::Text, "", "Required. The images that the rule is for."),
    field(
        "strategy",
        Kind::Choice(&["signed", "dev", "allow", "deny"]),
        "",
        "Required. How an image is verified.",
    ),
    field(
        "keyURI",
        Kind::Text,
        "",
        "Required with `signed` and `dev`. The public key: `aws-kms://ARN`, `awskms:///KEY`, `file:///PATH.pem`, or a PEM block.",
    ),
    field("annotations", Kind::Annotations, "", "With `signed` and `dev`: what the signed payload must say."),
    field(
        "remoteVerify",
        Kind::Flag,
        "",
        "With a KMS key: `true` lets KMS verify, instead of this node with the pinned public key. Default `false`.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{units, yaml};

    fn every_field<'a>(fields: &'a [Field], out: &mut Vec<&'a Field>) {
        for field in fields {
            out.push(field);
            match field.kind {
                Kind::Section(inner) | Kind::Named(inner) | Kind::Rules(inner) => every_field(inner, out),
                _ => {}
            }
        }
    }

    #[test]
    fn every_default_and_range_can_be_read() {
        let mut fields = Vec::new();
        every_field(TOP, &mut fields);
        for field in fields {
            assert!(yaml::parse(field.default).is_ok(), "{}", field.name);
            assert!(field.doc.ends_with('.') || field.doc.ends_with('`'), "{}: {}", field.name, field.doc);
            for limit in field.range.iter().flat_map(|(least, greatest)| [least, greatest]) {
                let readable = match field.kind {
                    Kind::Duration => units::duration(limit).is_ok(),
                    Kind::Size => units::size(limit).is_ok(),
                    Kind::Count => limit.parse::<u64>().is_ok(),
                    _ => false,
                };
                assert!(readable, "{}: {limit}", field.name);
            }
        }
    }

    #[test]
    fn the_reference_in_docs_is_generated() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
        if std::env::var_os("PULLGATE_BLESS").is_some() {
            std::fs::create_dir_all(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs")).unwrap();
            std::fs::write(path, markdown()).unwrap();
        }
        let found = std::fs::read_to_string(path).unwrap_or_default();
        assert!(found == markdown(), "{path} is out of date: run the tests with PULLGATE_BLESS=1");
    }
}
