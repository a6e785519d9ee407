use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use super::*;
use crate::reference::Reference;

const FILE: &str = "/etc/pullgate/config.yaml";
const RULES: &str = "verificationRules:\n  - {imageGlob: registry.k8s.io/**, strategy: allow}\n";
const ARN: &str = "aws-kms://arn:aws:kms:us-west-2:123456789012:key/aaaa";

fn parse(text: &str) -> Result<Loaded, ConfigErrors> {
    Config::parse(Path::new(FILE), text)
}

fn good(text: &str) -> Loaded {
    parse(text).unwrap_or_else(|errors| panic!("{text}\n{errors}"))
}

/// The first rule of a file with these lines in it.
fn rule(lines: &str) -> String {
    format!("verificationRules:\n  - imageGlob: quay.io/**\n{lines}")
}

fn pem_file(contents: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key.pem");
    std::fs::write(&path, contents).unwrap();
    (dir, path)
}

const PEM: &str = "-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEhIzlb5Tmkm8nBeR1e8Nxq4DfvxDy
a3IWPsm1a3N9CTSVaKxhYfmtcZPcCJpEVVV1aCwuC0vxlCmhNrZ9zZ1FcQ==
-----END PUBLIC KEY-----
";

#[test]
fn the_source_document_s_rules_work_as_they_stand() {
    let loaded = good(
        r#"
listen: /run/pullgate/pullgate.sock          # what the kubelet's imageServiceEndpoint names
admin: /run/pullgate/admin.sock
stateDir: /var/lib/pullgate
mode: enforce
containerd:
  address: /run/containerd/containerd.sock
  imageEndpoint: /run/containerd/containerd.sock   # the next CRI ImageService, if another proxy stood here
  namespace: k8s.io
  registryConfigPath: /etc/containerd/certs.d
metrics: {listen: "127.0.0.1:9473"}          # /metrics, /healthz, /readyz
cache: {positiveTTL: 12h, negativeTTL: 30s, staleGrace: 72h, maxEntries: 100000}
deadline: 10s
imageStatusDeadline: 2s
default: deny
verificationRules:
  - imageGlob: "123456789012.dkr.ecr.us-west-2.amazonaws.com/**"
    strategy: signed
    keyURI: "aws-kms://arn:aws:kms:us-west-2:123456789012:key/aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
    annotations: {build.system: approved-ci}
  - imageGlob: "localhost:5000/**"
    strategy: "dev"
    keyURI: "aws-kms://arn:aws:kms:us-east-1:000000000000:key/local-test-key"
"#,
    );
    assert_eq!(loaded.warnings, []);
    let image = "123456789012.dkr.ecr.us-west-2.amazonaws.com/team/app:v1";
    let rule = loaded.config.policy.find(&Reference::parse(image).unwrap()).unwrap();
    assert_eq!(rule.line, 17);
    let Strategy::Signed(signed) = &rule.strategy else { panic!("{rule:?}") };
    assert!(signed.annotations["build.system"].allows("approved-ci"));
    let rule = loaded.config.policy.find(&Reference::parse("localhost:5000/a").unwrap()).unwrap();
    assert!(matches!(rule.strategy, Strategy::Dev(_)));
    assert!(loaded.config.policy.find(&Reference::parse("busybox").unwrap()).is_none());
}

#[test]
fn what_is_left_out_has_its_default() {
    let Config {
        listen,
        admin,
        state_dir,
        containerd,
        runtime_service,
        allowed_uids,
        metrics,
        cache,
        deadline,
        image_status_deadline,
        limits,
        registry,
        aws,
        default,
        policy,
    } = good(RULES).config;
    assert_eq!(listen, Path::new("/run/pullgate/pullgate.sock"));
    assert_eq!(admin, Path::new("/run/pullgate/admin.sock"));
    assert_eq!(state_dir, Path::new("/var/lib/pullgate"));
    assert_eq!(containerd.address, Path::new("/run/containerd/containerd.sock"));
    assert_eq!(containerd.image_endpoint, containerd.address);
    assert_eq!(containerd.namespace, "k8s.io");
    assert_eq!(containerd.registry_config_path, Path::new("/etc/containerd/certs.d"));
    assert_eq!(runtime_service, RuntimeService::Refuse);
    assert_eq!(allowed_uids, [0]);
    assert_eq!(metrics, MetricsListen::Tcp("127.0.0.1:9473".parse().unwrap()));
    let hours = |n: u64| Duration::from_secs(n * 3600);
    let expected = Cache {
        positive_ttl: hours(12),
        negative_ttl: Duration::from_secs(30),
        stale_grace: hours(72),
        max_entries: 100_000,
    };
    assert_eq!(cache, expected);
    assert_eq!((deadline, image_status_deadline), (Duration::from_secs(10), Duration::from_secs(2)));
    let expected = Limits {
        concurrent_verifications: 16,
        manifest_size: 4 << 20,
        payload_size: 1 << 20,
        signatures: 64,
        registry_requests_per_second: 100,
        kms_requests_per_second: 20,
    };
    assert_eq!(limits, expected);
    assert_eq!(
        registry.docker_configs,
        [Path::new("/var/lib/kubelet/config.json"), Path::new("/root/.docker/config.json")]
    );
    let nothing = Aws {
        region: None,
        kms_endpoint: None,
        ecr_endpoint: None,
        regions: BTreeMap::new(),
        replica_regions: vec![],
        alias_recheck: Duration::from_secs(300),
    };
    assert_eq!(aws, nothing);
    assert_eq!(default, DefaultAction::Deny);
    assert_eq!(policy.rules()[0].name, "registry.k8s.io/**");
}

#[test]
fn what_is_written_is_taken() {
    let config = good(&format!(
        "metrics: {{listen: 'unix:///run/pullgate/metrics.sock'}}\nruntimeService: passThrough\nallowedUIDs: [0, 1000]\n\
         containerd: {{imageEndpoint: /run/soci/soci.sock}}\n\
         aws:\n  region: us-east-1\n  kmsEndpoint: https://kms.example.com\n  replicaRegions: [us-west-2]\n  aliasRecheck: 90s\n  \
         regions: {{us-west-2: {{kmsEndpoint: 'http://127.0.0.1:4566'}}}}\ncache:\n{RULES}"
    ));
    assert_eq!(config.warnings, []);
    let config = config.config;
    assert_eq!(config.metrics, MetricsListen::Unix("/run/pullgate/metrics.sock".into()));
    assert_eq!(config.runtime_service, RuntimeService::PassThrough);
    assert_eq!(config.allowed_uids, [0, 1000]);
    assert_eq!(config.containerd.image_endpoint, Path::new("/run/soci/soci.sock"));
    assert_eq!(config.aws.replica_regions, ["us-west-2"]);
    assert_eq!(config.aws.alias_recheck, Duration::from_secs(90));
    let local = config.aws.regions["us-west-2"].kms_endpoint.as_ref().unwrap();
    assert_eq!(local.as_str(), "http://127.0.0.1:4566/");
    assert_eq!(good(&format!("metrics: {{listen: off}}\n{RULES}")).config.metrics, MetricsListen::Off);
}

#[test]
fn keys_may_be_files_and_inline() {
    let (_dir, path) = pem_file(PEM);
    let text = rule(&format!("    strategy: signed\n    keyURI: file://{}\n", path.display()));
    assert_eq!(good(&text).warnings, []);
    let inline = PEM.replace('\n', "\n      ");
    good(&rule(&format!("    strategy: signed\n    keyURI: |\n      {inline}\n")));
}

/// A snippet, and the place, the message and the help that it must lead to. Snippets without
/// rules get a good one at their end.
struct Mistake(&'static str, &'static str, &'static str, &'static str);

const MISTAKES: &[Mistake] = &[
    Mistake(
        "deadine: 10s",
        "1:1: deadine",
        "unknown field",
        "did you mean `deadline`? allowed here: admin, allowedUIDs,",
    ),
    Mistake(
        "cache: {positiveTtl: 1h}",
        "1:9: cache.positiveTtl",
        "unknown field",
        "did you mean `positiveTTL`?",
    ),
    Mistake("zzz: 1", "1:1: zzz", "unknown field", "allowed here: admin"),
    Mistake("deadline: 10", "1:11: deadline", "the unit is missing", "write 10s, or 10m for minutes"),
    Mistake("deadline: -5s", "1:11: deadline", "can't be negative", ""),
    Mistake("deadline: 10 sec", "1:11: deadline", "the unit ` sec` is unknown", "a number and a unit"),
    Mistake("deadline: 0s", "1:11: deadline", "expected a value from 100ms to 10m", "the default is 10s"),
    Mistake("deadline: 99999999999999999999s", "1:11: deadline", "too large", ""),
    Mistake("deadline:", "1:9: deadline", "expected a number with a unit, found nothing", ""),
    Mistake("deadline: [1s]", "1:11: deadline", "found a list", ""),
    Mistake("limits: {manifestSize: 4}", "1:24: limits.manifestSize", "the unit is missing", "write 4B"),
    Mistake(
        "limits:\n  manifestSize: 4Mi",
        "2:17: limits.manifestSize",
        "the unit `Mi` is unknown",
        "write 4MiB",
    ),
    Mistake(
        "limits: {signatures: 0}",
        "1:22: limits.signatures",
        "expected a value from 1 to 4096",
        "the default is 64",
    ),
    Mistake("limits: {signatures: '64'}", "1:22: limits.signatures", "found the text `64`", "without quotes"),
    Mistake("limits: {signatures: 1.5}", "1:22: limits.signatures", "whole number", "decimal digits"),
    Mistake(
        "cache: 12h",
        "1:8: cache",
        "expected a mapping, found the text `12h`",
        "with the fields maxEntries,",
    ),
    Mistake("listen: pullgate.sock", "1:9: listen", "not an absolute path", "begin it with `/`"),
    Mistake("listen: unix:///run/a.sock", "1:9: listen", "found a URL", "write /run/a.sock"),
    Mistake("stateDir: /var/../tmp", "1:11: stateDir", "holds `..`", ""),
    Mistake(
        "listen: /run/containerd/containerd.sock",
        "1:9: listen",
        "the same socket as containerd.address",
        "circles",
    ),
    Mistake("listen: /var/run/pullgate/admin.sock", "1:1: admin", "the same socket as listen", ""),
    Mistake(
        "containerd: {imageEndpoint: /run/pullgate/pullgate.sock}",
        "1:1: listen",
        "the same socket as containerd.imageEndpoint",
        "",
    ),
    Mistake(
        "containerd: {namespace: 'a b'}",
        "1:25: containerd.namespace",
        "not a containerd namespace",
        "k8s.io",
    ),
    Mistake(
        "runtimeService: passthrough",
        "1:17: runtimeService",
        "not one of the values: refuse, passThrough",
        "did you mean `passThrough`?",
    ),
    Mistake("default: no", "1:10: default", "not one of the values: deny, allow", ""),
    Mistake("default: true", "1:10: default", "expected text, found the truth value true", "quote it"),
    Mistake("mode: dryRun", "1:7: mode", "not in this version", "write enforce"),
    Mistake("allowedUIDs: []", "1:14: allowedUIDs", "nobody could connect", "[0]"),
    Mistake("allowedUIDs: [0, root]", "1:18: allowedUIDs[1]", "expected a whole number", "digits"),
    Mistake("allowedUIDs: 0", "1:14: allowedUIDs", "expected a list", "[a, b]"),
    Mistake(
        "metrics: {listen: 'localhost:9473'}",
        "1:19: metrics.listen",
        "not an address",
        "write 127.0.0.1:9473",
    ),
    Mistake("metrics: {listen: '9473'}", "1:19: metrics.listen", "not an address", "unix:///PATH"),
    Mistake("metrics: off", "1:10: metrics", "expected a mapping", "with the fields listen"),
    Mistake("aws: {kmsEndpoint: kms.example.com}", "1:20: aws.kmsEndpoint", "not a URL", "https://HOST"),
    Mistake("aws: {kmsEndpoint: 'ftp://a'}", "1:20: aws.kmsEndpoint", "not an https URL", "https://HOST"),
    Mistake("aws: {kmsEndpoint: 'https://u:p@a/'}", "1:20: aws.kmsEndpoint", "neither user", "https://HOST"),
    Mistake("aws: {region: USWest}", "1:15: aws.region", "not an AWS Region", "us-west-2"),
    Mistake(
        "aws: {regions: {us-west-2: {kms: x}}}",
        "1:29: aws.regions.us-west-2.kms",
        "unknown field",
        "kmsEndpoint",
    ),
    Mistake(
        "registry: {dockerConfigs: [config.json]}",
        "1:28: registry.dockerConfigs[0]",
        "not an absolute path",
        "",
    ),
    Mistake(
        "deadline: 1s\ndeadline: 2s",
        "2:1",
        "`deadline` is written twice; the first is in line 1",
        "keep one",
    ),
    Mistake("cache:\n\tpositiveTTL: 1h", "2:", "not valid YAML", "tab"),
    Mistake("a: &x 1\nb: *x", "2:4", "aliases", "write the value out"),
    Mistake("<<: {deadline: 1s}", "1:1: <<", "unknown field", ""),
    Mistake("deadline: !secret 1s", "1:19", "tags", "remove the tag"),
    Mistake("deadline: 'x", "", "not valid YAML", ""),
    Mistake("- deadline: 1s\n---\nverificationRules: []", "3:1", "a second YAML document", "keep one"),
    Mistake("verificationRules: []", "1:20: verificationRules", "every image would be denied", "add a rule"),
    Mistake(
        "default: deny\nverificationRules:",
        "2:18: verificationRules",
        "every image would be denied",
        "add a rule",
    ),
    Mistake(
        "verificationRules: {imageGlob: '**'}",
        "1:20: verificationRules",
        "expected a list, found a mapping",
        "`- `",
    ),
    Mistake("verificationRules: [deny]", "1:21: verificationRules[0]", "expected a mapping", "imageGlob"),
    Mistake(
        "verificationRules:\n  - imageGlob: '**'\n    stratgy: deny",
        "3:5: verificationRules[0].stratgy",
        "unknown field",
        "did you mean `strategy`? allowed here: annotations, imageGlob, keyURI, name, remoteVerify, strategy",
    ),
    Mistake(
        "verificationRules:\n  - strategy: deny",
        "2:5: verificationRules[0].imageGlob",
        "missing field",
        "add imageGlob",
    ),
    Mistake(
        "verificationRules:\n  - imageGlob: '**'",
        "2:5: verificationRules[0].strategy",
        "missing field",
        "add strategy",
    ),
    Mistake(
        "verificationRules:\n  - imageGlob: ''\n    strategy: deny",
        "2:16: verificationRules[0].imageGlob",
        "empty",
        "**",
    ),
    Mistake(
        "verificationRules:\n  - imageGlob: busybox\n    strategy: deny",
        "2:16: verificationRules[0].imageGlob",
        "can ever match",
        "write docker.io/library/busybox",
    ),
    Mistake(
        "verificationRules:\n  - imageGlob: 'quay.io/[a'\n    strategy: deny",
        "2:16: verificationRules[0].imageGlob",
        "never closed",
        "`]`",
    ),
    Mistake(
        "verificationRules:\n  - imageGlob: '**'\n    strategy: sigend",
        "3:15: verificationRules[0].strategy",
        "not one of the values: signed, dev, allow, deny",
        "did you mean `signed`?",
    ),
    Mistake(
        "verificationRules:\n  - imageGlob: '**'\n    strategy: signed",
        "2:5: verificationRules[0].keyURI",
        "the strategy needs a key",
        "add keyURI",
    ),
    Mistake(
        "verificationRules:\n  - {imageGlob: '**', strategy: deny, keyURI: 'awskms:///a'}",
        "2:39: verificationRules[0].keyURI",
        "would have no effect",
        "remove it",
    ),
    Mistake(
        "verificationRules:\n  - {imageGlob: 'quay.io/*', strategy: allow, annotations: {a: b}}",
        "2:47: verificationRules[0].annotations",
        "would have no effect",
        "remove it",
    ),
    Mistake(
        "verificationRules:\n  - {imageGlob: '**', strategy: signed, keyURI: 'https://a'}",
        "2:49: verificationRules[0].keyURI",
        "expected aws-kms://ARN",
        "",
    ),
    Mistake(
        "verificationRules:\n  - {imageGlob: '**', strategy: signed, keyURI: 'file:///nowhere/ci.pem'}",
        "2:49: verificationRules[0].keyURI",
        "the key file /nowhere/ci.pem: it can't be read: No such file",
        "",
    ),
    Mistake(
        "verificationRules:\n  - {imageGlob: '**', strategy: signed, keyURI: 'file:///etc'}",
        "2:49: verificationRules[0].keyURI",
        "not a regular file",
        "",
    ),
    Mistake(
        "verificationRules:\n  - {imageGlob: '**', strategy: signed, keyURI: 'file:///etc/hostname'}",
        "2:49: verificationRules[0].keyURI",
        "no PEM block",
        "in PEM",
    ),
    Mistake(
        "verificationRules:\n  - imageGlob: '**'\n    strategy: signed\n    keyURI: |\n      -----BEGIN CERTIFICATE-----\n      AAAA\n      -----END CERTIFICATE-----",
        "5:7: verificationRules[0].keyURI",
        "found `CERTIFICATE`",
        "",
    ),
    Mistake(
        "verificationRules:\n  - imageGlob: '**'\n    strategy: signed\n    keyURI: |\n      -----BEGIN PUBLIC KEY-----\n      AAAA\n      -----END PUBLIC KEY-----",
        "5:7: verificationRules[0].keyURI",
        "not a public key",
        "ECDSA",
    ),
    Mistake(
        "verificationRules:\n  - {imageGlob: '**', strategy: signed, keyURI: 'awskms:///a', annotations: {a: 1}}",
        "2:81: verificationRules[0].annotations.a",
        "found the number 1",
        "quote it: \"1\"",
    ),
    Mistake(
        "verificationRules:\n  - {imageGlob: '**', strategy: signed, keyURI: 'awskms:///a', annotations: [a]}",
        "2:77: verificationRules[0].annotations",
        "expected a mapping, found a list",
        "approved-ci",
    ),
    Mistake(
        "verificationRules:\n  - {imageGlob: '**', strategy: signed, keyURI: 'awskms:///a', remoteVerify: yes}",
        "2:78: verificationRules[0].remoteVerify",
        "expected true or false",
        "true or false",
    ),
    Mistake(
        "verificationRules:\n  - {imageGlob: '**', strategy: deny}\n  - {imageGlob: quay.io/a, strategy: deny}",
        "3:17: verificationRules[1].imageGlob",
        "never reached: `**` in line 2",
        "move it before line 2",
    ),
    Mistake(
        "verificationRules:\n  - {imageGlob: quay.io/**, strategy: deny}\n  - {imageGlob: 'quay.io/a/*', strategy: deny}",
        "3:17: verificationRules[1].imageGlob",
        "never reached: `quay.io/**` in line 2",
        "move it",
    ),
    Mistake(
        "verificationRules:\n  - {imageGlob: quay.io/a, strategy: deny}\n  - {imageGlob: quay.io/a, strategy: allow}",
        "3:17: verificationRules[1].imageGlob",
        "line 2 has the same glob",
        "the first decides",
    ),
    Mistake(
        "verificationRules:\n  - {imageGlob: quay.io/a, strategy: deny}\n  - {imageGlob: 'quay.io/a:1.*', strategy: allow}",
        "3:17: verificationRules[1].imageGlob",
        "never reached: `quay.io/a` in line 2",
        "move it",
    ),
    Mistake(
        "verificationRules:\n  - {name: a, imageGlob: quay.io/a, strategy: deny}\n  - {name: a, imageGlob: quay.io/b, strategy: deny}",
        "3:12: verificationRules[1].name",
        "the name `a` is taken",
        "line 2",
    ),
    Mistake(
        "verificationRules:\n  - {name: 7, imageGlob: quay.io/a, strategy: deny}",
        "2:12: verificationRules[0].name",
        "found the number 7",
        "quote it: \"7\"",
    ),
    Mistake(
        "verificationRules:\n  - {name: ' ', imageGlob: quay.io/a, strategy: deny}",
        "2:12: verificationRules[0].name",
        "a name is one line",
        "",
    ),
];

#[test]
fn every_kind_of_mistake_has_its_place_its_message_and_its_help() {
    let mut differences = String::new();
    for Mistake(text, place, message, help) in MISTAKES {
        let rules = if text.contains("verificationRules") { "" } else { RULES };
        let errors = parse(&format!("{text}\n{rules}")).expect_err(text);
        let [problem] = errors.problems() else {
            let _ = writeln!(differences, "not one error:\n{text}\n{errors}\n");
            continue;
        };
        let found = problem.to_string();
        let (first, remedy) = found.split_once("\n  help: ").unwrap_or((&found, ""));
        let expected = first.starts_with(&format!("error: {FILE}:{place}"))
            && first.contains(message)
            && remedy.contains(help);
        if !expected {
            let _ = writeln!(differences, "{text}\n{found}\n  expected {place}, {message}, {help}\n");
        }
    }
    assert!(differences.is_empty(), "{differences}");
}

#[test]
fn a_local_key_can_t_verify_remotely() {
    let (_dir, path) = pem_file(PEM);
    let text = rule(&format!(
        "    strategy: signed\n    keyURI: file://{}\n    remoteVerify: true\n",
        path.display()
    ));
    assert!(
        parse(&text).unwrap_err().to_string().contains("5:19: verificationRules[0].remoteVerify: only KMS")
    );
    good(&rule(&format!("    strategy: signed\n    keyURI: {ARN}\n    remoteVerify: true\n")));
}

#[test]
fn a_private_key_is_told_apart_and_never_shown() {
    let secret = "MHcCAQEEIPrivatePrivatePrivate";
    let (_dir, path) =
        pem_file(&format!("-----BEGIN EC PRIVATE KEY-----\n{secret}\n-----END EC PRIVATE KEY-----\n"));
    let text = rule(&format!("    strategy: signed\n    keyURI: file://{}\n", path.display()));
    let errors = parse(&text).unwrap_err().to_string();
    assert!(errors.contains("key.pem") && !errors.contains(secret), "{errors}");
}

#[test]
fn all_mistakes_are_told_at_once_in_the_order_of_the_lines() {
    let text = "deadline: 10\nlimits: {signatures: 0}\nverificationRules:\n  - imageGlob: busybox\n    strategy: sigend\n    keyURI: x\nnonsense: 1\n";
    let lines: Vec<usize> =
        parse(text).unwrap_err().problems().iter().map(|problem| problem.at.line).collect();
    assert_eq!(lines, [1, 2, 4, 5, 6, 7]);
}

#[test]
fn errors_read_as_rustc_writes_them() {
    let text = format!("{}    stratgy: allow\n", rule(""));
    let errors = parse(&text).unwrap_err().to_string();
    assert!(errors.contains(
        "error: /etc/pullgate/config.yaml:3:5: verificationRules[0].stratgy: unknown field\n  \
         help: did you mean `strategy`? allowed here: annotations, imageGlob, keyURI, name, remoteVerify, strategy"
    ), "{errors}");
}

#[test]
fn what_is_odd_is_a_warning() {
    for (text, part) in [
        ("default: allow", "config.yaml:1:10: default: every image"),
        ("metrics: {listen: '0.0.0.0:9473'}", "metrics.listen: everybody"),
        ("metrics: {listen: '127.0.0.1:0'}", "metrics.listen: port 0"),
        ("cache: {negativeTTL: 24h}", "cache.negativeTTL: denials"),
        ("imageStatusDeadline: 30s", "imageStatusDeadline: an ImageStatus"),
        ("aws: {kmsEndpoint: 'http://kms.example.com'}", "aws.kmsEndpoint: whoever"),
        (
            "verificationRules: [{imageGlob: '**', strategy: allow}]",
            "verificationRules[0].imageGlob: every image",
        ),
        (
            "verificationRules: [{imageGlob: 'quay.io/a:v1*', strategy: deny}]",
            "verificationRules[0].imageGlob: the same image by its digest",
        ),
        (
            "verificationRules: [{imageGlob: quay.io/a, strategy: dev, keyURI: 'awskms:///a'}]",
            "strategy: `dev` permits",
        ),
    ] {
        let rules = if text.contains("verificationRules") { "" } else { RULES };
        let warnings = good(&format!("{text}\n{rules}")).warnings;
        let [warning] = warnings.as_slice() else { panic!("{text}: {warnings:#?}") };
        assert!(
            warning.to_string().starts_with("warning: ") && warning.to_string().contains(part),
            "{warning}"
        );
    }
    assert_eq!(good("default: allow\n").warnings.len(), 1, "no rules are needed where allow is the default");
}

#[test]
fn an_empty_file_is_an_error() {
    for text in ["", "\n", "# later\n", "---\n"] {
        let errors = parse(text).unwrap_err().to_string();
        assert!(errors.contains(": verificationRules: there are no rules"), "{text:?}: {errors}");
    }
}

#[test]
fn files_that_can_t_be_read_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let message = |path: &Path| Config::load(path).unwrap_err().to_string();
    let missing = dir.path().join("missing.yaml");
    assert!(
        message(&missing)
            .starts_with(&format!("error: {}: the file can't be read: No such", missing.display()))
    );
    assert!(message(dir.path()).contains("this is a directory"));
    let binary = dir.path().join("binary.yaml");
    std::fs::write(&binary, b"a: \xff\n").unwrap();
    assert!(message(&binary).contains("not UTF-8 text: byte 3"));
    let large = dir.path().join("large.yaml");
    std::fs::write(&large, "#".repeat(5 << 20)).unwrap();
    assert!(message(&large).contains("larger than 4 MiB"));
}

#[test]
fn the_fingerprint_is_that_of_the_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.yaml");
    std::fs::write(&path, RULES).unwrap();
    assert_eq!(Config::load(&path).unwrap().fingerprint, Digest::sha256(RULES.as_bytes()));
}

/// Read, checked and indexed within a second even without optimisation.
#[test]
fn ten_thousand_rules_are_loaded_quickly() {
    let mut text = String::from("verificationRules:\n");
    for n in 0..10_000 {
        let _ = writeln!(
            text,
            "  - imageGlob: quay.io/team-{n}/**\n    strategy: signed\n    keyURI: {ARN}\n    annotations: {{a: b}}"
        );
    }
    let start = Instant::now();
    let loaded = good(&text);
    println!("{:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(loaded.config.policy.rules().len(), 10_000);
}
