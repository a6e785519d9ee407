//! The names that a Pod can write: one image has one rule, however it is spelled, and what can't be
//! read as containerd reads it is refused with a clean text.

use anyhow::{Context, Result};
use pullgate_tests::{Image, KeyPair, Pullgate, Pushed, Version, World, policy};
use serde_json::Value;
use std::collections::BTreeSet;
use tonic::{Code, Status};

pullgate_tests::on_both! {
    every_spelling_of_a_signed_image_has_its_one_rule_and_its_one_verification,
    no_spelling_of_a_denied_image_gets_past_its_rule,
    what_cannot_be_read_is_refused_in_one_clean_line,
}

/// A world in which `docker.io`, `LOCALHOST:5000` and an IPv6 host all are the one registry.
struct Hub {
    world: World,
    key: KeyPair,
}

const IPV6: &str = "[::1]:5000";
/// containerd takes hosts in capitals.
const CAPITALS: &str = "LOCALHOST:5000";

impl Hub {
    async fn on(version: Version) -> Result<Self> {
        let world = World::on(version).await?;
        for host in ["docker.io", IPV6, "[0:0:0:0:0:0:0:1]:5000", CAPITALS] {
            world.containerd.mirror(host, &world.registry)?;
        }
        let key = world.cosign().await?.generate_key("ci").await?;
        Ok(Self { world, key })
    }

    async fn push(&self, name: &str) -> Result<Pushed> {
        Image::new(&format!("library/{name}")).tag("latest").push(&self.world.registry).await
    }

    async fn signed(&self, name: &str) -> Result<Pushed> {
        let image = self.push(name).await?;
        self.world.cosign().await?.sign(&self.key.key(), &image.by_digest()).await?;
        self.world.registry.proxy.forget();
        Ok(image)
    }

    fn host(&self) -> &str {
        self.world.registry.host()
    }
}

/// How an image of the Hub can be named.
fn spellings(image: &Pushed) -> Vec<String> {
    let name = image.repository.trim_start_matches("library/");
    let mut all = Vec::new();
    for host in ["", "docker.io/", "index.docker.io/"] {
        for path in [name.to_owned(), image.repository.clone()] {
            for pointer in [
                String::new(),
                ":latest".to_owned(),
                format!("@{}", image.digest),
                format!(":latest@{}", image.digest),
                format!(":no-such-tag@{}", image.digest),
            ] {
                all.push(format!("{host}{path}{pointer}"));
            }
        }
    }
    all
}

/// `pullgate verify --output json`: the exit code, and the one object.
async fn verify(pullgate: &Pullgate, image: &str) -> Result<(Option<i32>, Value)> {
    let said = pullgate.admin(&["verify", "--output", "json", image]).await?;
    let judged = serde_json::from_str(&said.stdout).with_context(|| format!("{image}: {said:?}"))?;
    Ok((said.status.code(), judged))
}

async fn every_spelling_of_a_signed_image_has_its_one_rule_and_its_one_verification(
    version: Version,
) -> Result<()> {
    let hub = Hub::on(version).await?;
    let (key, host) = (hub.key.uri(), hub.host());
    let rules = policy::rules(&[
        format!("{{name: hub, imageGlob: docker.io/library/a, strategy: signed, keyURI: \"{key}\"}}"),
        format!("{{name: port, imageGlob: \"{host}/library/a\", strategy: signed, keyURI: \"{key}\"}}"),
        format!("{{name: v6, imageGlob: '\\[::1\\]:5000/library/a', strategy: signed, keyURI: \"{key}\"}}"),
        "{name: rest, imageGlob: \"**\", strategy: deny}".to_owned(),
    ]);
    let pullgate = Pullgate::start(&hub.world, &rules).await?;
    let image = hub.signed("a").await?;
    let proxy = &hub.world.registry.proxy;
    let signatures = format!("/v2/library/a/manifests/{}", image.cosign_tag(".sig"));

    let tagged = |host: &str| format!("{host}/library/a:latest");
    let pinned = |host: &str| format!("{host}/library/a@{}", image.digest);
    let mut names: Vec<(String, &str, &str)> =
        spellings(&image).into_iter().map(|name| (name, "hub", "docker.io")).collect();
    for name in [tagged(host), pinned(host), format!("{host}/library/a:v9@{}", image.digest)] {
        names.push((name, "port", host));
    }
    // containerd before 2 does not know IPv6 hosts.
    if version == Version::V21 {
        for host in [IPV6, "[0:0:0:0:0:0:0:1]:5000"] {
            names.extend([(tagged(host), "v6", IPV6), (pinned(host), "v6", IPV6)]);
        }
    }
    let mut rules_seen = BTreeSet::new();
    for (name, rule, host) in &names {
        let before = pullgate.audit().len();
        let id = pullgate.cri().pull(name).await.with_context(|| name.clone())?;
        assert_eq!(id, image.config_digest, "{name}");
        let entry = pullgate.audit().get(before).cloned().context("no entry")?;
        let normalised = if name.contains('@') { pinned(host) } else { tagged(host) };
        assert_eq!(
            (&entry["PULLGATE_RULE"], &entry["PULLGATE_IMAGE"]),
            (&(*rule).into(), &normalised.into())
        );
        assert_eq!(entry["PULLGATE_DIGEST"], *image.digest);
        let is_spelled_as_recorded = !name.starts_with("[0:");
        let status = pullgate.cri().image_status(name).await?;
        assert_eq!(status.map(|image| image.id), is_spelled_as_recorded.then_some(id), "{name}");
        rules_seen.insert(*rule);
    }
    assert_eq!(proxy.count("GET", &signatures), rules_seen.len(), "one verification for each repository");

    for (name, rule, _) in names.iter().filter(|(name, ..)| !name.contains("no-such-tag")).step_by(4) {
        let (code, judged) = verify(&pullgate, name).await?;
        assert_eq!(
            (code, &judged["decision"], &judged["reason"]),
            (Some(0), &"allow".into(), &"signed".into())
        );
        assert_eq!((&judged["rule"], &judged["digest"]), (&(*rule).into(), &image.digest.clone().into()));
    }
    Ok(())
}

/// Names that may or may not be names; none of them makes containerd look anything up in DNS.
fn oddities(image: &Pushed) -> Vec<String> {
    let (digest, hex) = (&image.digest, image.digest.trim_start_matches("sha256:"));
    let mut all: Vec<String> = [
        // Spaces, control characters, and what a terminal or a log would make of them.
        " b",
        "b ",
        "b:latest ",
        "b\t",
        "b\n",
        "\nb",
        "b\r\nb",
        "b\0",
        "b\0:latest",
        "\u{1b}[31mb",
        "b:\u{7f}",
        // Paths and addresses.
        "./b",
        "../b",
        "b/",
        "//b",
        "/b",
        "docker.io//b",
        "library/./b",
        "library/../library/b",
        "b/.",
        "http://docker.io/library/b",
        "docker://b",
        "b?x=y",
        "b#latest",
        "%62",
        "b%00",
        "~b",
        "$b",
        "-b",
        ".b",
        "_b",
        "b-",
        "b_",
        "b.",
        "b..b",
        "b__b",
        "b___b",
        "b--b",
        "a:b:c",
        "b:",
        "b@",
        "@",
        ":",
        ":latest",
        "@b",
        "b@latest",
        "b@sha256",
        "b@sha256:",
        "b@sha256:abc",
        "b@md5:d41d8cd98f00b204e9800998ecf8427e",
        // Capitals.
        "B",
        "Busybox",
        "b:LATEST",
        "docker.io/Library/b",
        "LOCALHOST:5000/library/b",
        "LOCALHOST:5000/library/b:latest",
        "LocalHost:5000/library/b",
        "LOCALHOST:5000/b",
        // Unicode: look-alikes, other digits, marks that nobody sees.
        "\u{431}",
        "\u{ff42}",
        "b\u{200b}",
        "b\u{301}",
        "b:\u{663}",
        "\u{202e}b",
        "docker.io\u{2215}b",
        "b:ß",
        "b\u{feff}",
        // IPv6.
        "[::1]:5000/library/b",
        "[::1]:5000/library/b:latest",
        "[0:0:0:0:0:0:0:1]:5000/library/b",
        "[::1]/b",
        "[::1",
        "[::1]:5000",
        "[::zz]:5000/b",
        "[::1]:x/b",
        "[]:5000/b",
        "::1:5000/b",
        // Image IDs, nearly.
        "sha256:abcdef",
        "sha256",
        "abcdef012345",
    ]
    .map(str::to_owned)
    .to_vec();
    all.extend([
        String::new(),
        hex.to_owned(),
        format!("library/{hex}"),
        format!("b@{}", digest.to_uppercase()),
        format!("b@sha256:{}", hex.to_uppercase()),
        format!("b@{digest}@{digest}"),
        format!("b@{digest}:latest"),
        format!("b:latest:latest@{digest}"),
        format!("b@sha512:{hex}{hex}"),
        format!("b@sha256+b64u:{hex}"),
        format!(" b@{digest}"),
        format!("b@{digest}\n"),
        "x".repeat(240),
        "x".repeat(255),
        "x".repeat(300),
        "x".repeat(100_000),
        format!("b:{}", "t".repeat(128)),
        format!("b:{}", "t".repeat(129)),
        format!("{}b", "x/".repeat(120)),
        format!("{CAPITALS}/library/b@{digest}"),
        format!("{IPV6}/library/b@{digest}"),
    ]);
    all
}

async fn no_spelling_of_a_denied_image_gets_past_its_rule(version: Version) -> Result<()> {
    let hub = Hub::on(version).await?;
    // Everything else is allowed.
    let rules = policy::rules(&[
        "{name: no-b, imageGlob: docker.io/library/b, strategy: deny}".to_owned(),
        "{name: no-b6, imageGlob: '\\[::1\\]:5000/**', strategy: deny}".to_owned(),
        "{name: rest, imageGlob: \"**\", strategy: allow}".to_owned(),
    ]);
    let pullgate = Pullgate::start(&hub.world, &rules).await?;
    let image = hub.push("b").await?;
    let (direct, gated) = (hub.world.cri()?, pullgate.cri());

    let mut names_of_it = 0;
    for name in spellings(&image).into_iter().chain(oddities(&image)) {
        let (straight, through) = (direct.pull(&name).await, gated.pull(&name).await);
        match (straight, through) {
            (Ok(id), through) => {
                assert_eq!(id, image.config_digest, "{name:?}: there is no other image");
                let refused = through.err().with_context(|| format!("{name:?} was pulled"))?;
                assert!(is_clean(&refused), "{name:?}: {refused:?}");
                assert_eq!(gated.image_status(&name).await?, None, "{name:?} is served");
                direct.image_status(&name).await?.with_context(|| format!("{name:?} is not there"))?;
                names_of_it += 1;
            }
            (Err(_), Ok(id)) => anyhow::bail!("{name:?} was pulled as {id}, past containerd's own rules"),
            // Refused by us, or passed on and answered by containerd as it answers everybody.
            (Err(straight), Err(through)) if !is_clean(&through) => {
                assert_eq!(
                    (through.code(), through.message()),
                    (straight.code(), straight.message()),
                    "{name:?}"
                );
            }
            (Err(_), Err(_)) => {}
        }
    }
    // Hosts in capitals, which no rule of ours can name, and from 2 on IPv6 hosts.
    let others = if version == Version::V21 { 3 + 4 } else { 3 };
    assert_eq!(names_of_it, spellings(&image).len() + others, "as many names containerd takes");

    // By its id, too: none of its names is allowed.
    assert!(direct.image_status(&image.config_digest).await?.is_some());
    assert_eq!(gated.image_status(&image.config_digest).await?, None);
    Ok(())
}

/// A refusal of ours: one printable line that the kubelet shows with its reason.
fn is_clean(status: &Status) -> bool {
    let text = status.message();
    status.code() == Code::Unknown
        && text.starts_with("SignatureValidationFailed: image ")
        && text.contains("; remedy: ")
        && text.chars().all(|c| c == ' ' || c.is_ascii_graphic())
        && text.len() < 2000
}

async fn what_cannot_be_read_is_refused_in_one_clean_line(version: Version) -> Result<()> {
    let hub = Hub::on(version).await?;
    let rules = policy::rules(&["{imageGlob: \"**\", strategy: allow}".to_owned()]);
    let pullgate = Pullgate::start(&hub.world, &rules).await?;
    let image = hub.push("b").await?;
    let (direct, gated) = (hub.world.cri()?, pullgate.cri());
    let hex = "0123456789abcdef".repeat(4);
    let unreadable = [
        "",
        "b\0",
        "b\n",
        "\u{1b}]0;title\u{7}b",
        "b c",
        "Busybox",
        "LOCALHOST:5000/library/b",
        "\u{202e}b",
        "b:ß",
        "\u{431}",
        "b\u{200b}",
        &hex,
        &"x".repeat(300),
        &"x".repeat(100_000),
        &format!("b@{}", image.digest.to_uppercase()),
        "b@md5:d41d8cd98f00b204e9800998ecf8427e",
        "http://docker.io/library/b",
        "[::1",
        "\"quoted\"",
        "{\"json\": 1}",
        "a'; reboot; '",
        "`x`",
    ];
    for name in unreadable {
        let refused = gated.pull(name).await.err().with_context(|| format!("{name:?} was pulled"))?;
        assert!(is_clean(&refused), "{name:?}: {refused:?}");
        assert!(refused.message().contains(": invalid-reference: "), "{name:?}: {refused:?}");
        let again = gated.pull(name).await.err().context("it was pulled")?;
        assert_eq!(refused.message(), again.message(), "the same text every time");
        // `ImageStatus` says what containerd says: that it is not there, or that this is no name.
        let (straight, through) = (direct.image_status(name).await, gated.image_status(name).await);
        match (straight, through) {
            // The start of every image ID; the only image is meant, and all images are allowed.
            (Ok(only), Ok(image)) if name.is_empty() => assert_eq!(only, image),
            (Ok(_), Ok(image)) => assert_eq!(image, None, "{name:?}"),
            (Err(straight), Err(through)) => {
                assert_eq!((straight.code(), straight.message()), (through.code(), through.message()));
            }
            differing => anyhow::bail!("{name:?}: {differing:?}"),
        }
        // An argument can't hold a NUL, and no longer one than 128 KiB.
        if !name.contains('\0') {
            let (code, judged) = verify(&pullgate, name).await?;
            assert_eq!((code, &judged["reason"]), (Some(1), &"invalid-reference".into()), "{name:?}");
            assert_eq!(judged["message"], *refused.message(), "{name:?}");
        }
    }
    // A name in the log can neither begin a new line nor end its field.
    let log = pullgate.log();
    for line in log.lines() {
        let entry: Value = serde_json::from_str(line).with_context(|| format!("{line:?}"))?;
        let image = entry["PULLGATE_IMAGE"].as_str().unwrap_or_default();
        assert!(image.chars().all(|c| c.is_ascii_graphic() || c == ' '), "{image:?}");
    }
    assert_eq!(log.matches("\"invalid-reference\"").count(), unreadable.len() * 2);
    // Nothing reached containerd, and what can be read is served as before.
    assert_eq!(gated.run_container("b").await?, "hello\n");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_ends_with_0_allow_1_deny_2_usage_3_try_again() -> Result<()> {
    let hub = Hub::on(Version::V16).await?;
    let (key, host) = (hub.key.uri(), hub.host());
    let rules = policy::rules(&[
        format!("{{name: open, imageGlob: \"{host}/open/**\", strategy: allow}}"),
        format!("{{name: shut, imageGlob: \"{host}/shut/**\", strategy: deny}}"),
        format!("{{name: ci, imageGlob: \"docker.io/library/*\", strategy: signed, keyURI: \"{key}\"}}"),
    ]);
    // No daemon is needed: only its configuration.
    let pullgate = Pullgate::start(&hub.world, &rules).await?;
    pullgate.stop().await?;
    let (signed, unsigned) = (hub.signed("a").await?, hub.push("b").await?);
    let none = Value::Null;
    let (a, b): (Value, Value) = (signed.digest.clone().into(), unsigned.digest.clone().into());
    let cases = [
        ("a", 0, "allow", "signed", "ci", &a),
        ("docker.io/library/a:latest", 0, "allow", "signed", "ci", &a),
        (&format!("a:b@{}", signed.digest), 0, "allow", "signed", "ci", &a),
        (&format!("{host}/open/any:1"), 0, "allow", "allow-rule", "open", &none),
        ("b", 1, "deny", "unsigned", "ci", &b),
        (&format!("{host}/shut/any:1"), 1, "deny", "deny-rule", "shut", &none),
        (&format!("{host}/other/any:1"), 1, "deny", "no-rule", "", &none),
        ("No such name", 1, "deny", "invalid-reference", "", &none),
        ("", 1, "deny", "invalid-reference", "", &none),
        ("missing", 3, "failure", "image-not-found", "ci", &none),
    ];
    for (image, code, decision, reason, rule, digest) in cases {
        let (ended, judged) = verify(&pullgate, image).await?;
        assert_eq!(ended, Some(code), "{image}: {judged}");
        assert_eq!((&judged["decision"], &judged["reason"]), (&decision.into(), &reason.into()), "{image}");
        assert_eq!(judged["rule"].as_str().unwrap_or_default(), rule, "{image}");
        assert_eq!(judged["digest"], *digest, "{image}");
        assert!(judged["message"].as_str().is_some_and(|text| !text.contains('\n')), "{judged}");
        let names: Vec<&str> = judged.as_object().context("no object")?.keys().map(String::as_str).collect();
        for name in ["image", "digest", "decision", "reason", "rule", "message"] {
            assert!(names.contains(&name), "{name} is not in {judged}");
        }
        // For people: one line, the same exit code.
        let said = pullgate.admin(&["verify", image]).await?;
        assert_eq!(said.status.code(), Some(code), "{said:?}");
        assert!(said.stdout.starts_with(decision) && said.stdout.lines().count() == 1, "{said:?}");
    }

    hub.world.registry.kill9();
    let (ended, judged) = verify(&pullgate, "a").await?;
    assert_eq!((ended, &judged["reason"]), (Some(3), &"registry-unavailable".into()));

    for wrong in
        [&["verify"][..], &["verify", "a", "b"], &["verify", "--no-such-flag", "a"], &["verify", "-a"]]
    {
        let said = pullgate.admin(wrong).await?;
        assert_eq!((said.status.code(), said.stdout.as_str()), (Some(2), ""), "{wrong:?}: {said:?}");
    }
    std::fs::write(pullgate.config(), "verificationRules: 7\n")?;
    let said = pullgate.admin(&["verify", "--output", "json", "a"]).await?;
    assert_eq!((said.status.code(), said.stdout.as_str()), (Some(2), ""), "{said:?}");
    std::fs::remove_file(pullgate.config())?;
    let said = pullgate.admin(&["verify", "a"]).await?;
    assert_eq!(said.status.code(), Some(2), "{said:?}");
    assert!(said.stderr.contains("config.yaml"), "{said:?}");
    Ok(())
}
