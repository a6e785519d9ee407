//! The units under a real systemd, and the journal.

use anyhow::{Context, Result};
use pullgate_tests::cri::{Cri, PullOptions};
use pullgate_tests::grpc::Client;
use pullgate_tests::nspawn::CONTAINERD;
use pullgate_tests::{Cosign, Fault, Gate, Image, KeyPair, Nspawn, Pushed, Rule, World, wait};
use serde_json::Value;
use std::path::Path;

const SERVICE: &str = "pullgate.service";
const ALLOWED: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d801";
const DENIED: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d802";
const POLICY_LOADED: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d807";
const POLICY_REFUSED: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d808";

/// A world, and a machine where pullgate runs as a service in front of the world's containerd.
struct Node {
    machine: Nspawn,
    cri: Cri,
    cosign: Cosign,
    key: KeyPair,
    world: World,
}

impl Node {
    /// Installed and configured, not started.
    async fn boot() -> Result<Self> {
        let world = World::start().await?;
        let cosign = world.cosign().await?;
        let key = cosign.generate_key("ci").await?;
        let machine = Nspawn::boot(&world).await?;
        machine.write("/etc/pullgate/keys/ci.pub", &std::fs::read_to_string(&key.public)?)?;
        let environment = world.aws_env().iter().fold("[Service]\n".to_owned(), |text, (name, value)| {
            text + &format!("Environment={name}={value}\n")
        });
        machine.write("/etc/systemd/system/pullgate.service.d/aws.conf", &environment)?;
        machine.run_ok(&["systemctl", "daemon-reload"]).await?;
        let cri = world.containerd.cri_through(&machine.path("/run/pullgate/pullgate.sock"))?;
        let node = Self { machine, cri, cosign, key, world };
        node.configure("strategy: signed, keyURI: \"file:///etc/pullgate/keys/ci.pub\"")?;
        Ok(node)
    }

    /// [`Node::boot`], and started.
    async fn start() -> Result<Self> {
        let node = Self::boot().await?;
        node.machine.run_ok(&["systemctl", "start", "pullgate.socket", SERVICE]).await?;
        Ok(node)
    }

    /// One rule for the world's registry.
    fn configure(&self, rule: &str) -> Result<()> {
        let text = format!(
            "containerd: {{address: {CONTAINERD}/c.sock, registryConfigPath: {CONTAINERD}/certs.d}}\n\
             metrics: {{listen: \"unix:///run/pullgate/metrics.sock\"}}\n\
             verificationRules:\n  - {{name: the-rule, imageGlob: \"{}/**\", {rule}}}\n",
            self.world.registry.host()
        );
        self.machine.write("/etc/pullgate/config.yaml", &text)
    }

    async fn signed(&self, name: &str) -> Result<Pushed> {
        let image = Image::new(name).push(&self.world.registry).await?;
        self.cosign.sign(&self.key.key(), &image.by_digest()).await?;
        Ok(image)
    }

    async fn main_pid(&self) -> Result<String> {
        self.machine.property(SERVICE, "MainPID").await
    }

    async fn is_active(&self) -> Result<()> {
        wait::until("the service to be active", wait::LONG, async || {
            Ok((self.machine.property(SERVICE, "ActiveState").await? == "active").then_some(()))
        })
        .await
    }

    /// Waits for journal entries that match.
    async fn journal(&self, count: usize, matches: &[&str]) -> Result<Vec<Value>> {
        wait::until(&format!("{count} entries of {matches:?}"), wait::LONG, async || {
            Ok(Some(self.machine.journal(matches).await?).filter(|entries| entries.len() >= count))
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_starts_and_writes_one_journal_entry_a_decision() -> Result<()> {
    let node = Node::start().await?;
    assert_eq!(node.machine.property(SERVICE, "ActiveState").await?, "active");
    assert_eq!(node.machine.property(SERVICE, "Type").await?, "notify");
    let (signed, unsigned) =
        (node.signed("signed").await?, Image::new("unsigned").push(&node.world.registry).await?);
    let pod = PullOptions {
        namespace: Some("shop".into()),
        pod: Some("cart-7d4b9".into()),
        ..PullOptions::default()
    };
    assert_eq!(node.cri.pull_with(&signed.by_tag(), &pod).await?, signed.config_digest);
    let refusal = node.cri.pull_with(&unsigned.by_tag(), &pod).await.err().context("it was pulled")?;
    node.cri.pull_with(&signed.by_tag(), &pod).await?;
    assert_eq!(node.cri.run_container(&signed.by_tag()).await?, "hello\n");

    let entries = node.journal(3, &["_SYSTEMD_UNIT=pullgate.service", "PULLGATE_METHOD=PullImage"]).await?;
    assert_eq!(entries.len(), 3, "one a decision");
    let expected = [
        (&signed, ALLOWED, "allow", "signed", "miss", "5"),
        (&unsigned, DENIED, "deny", "unsigned", "miss", "4"),
        (&signed, ALLOWED, "allow", "signed", "memory", "5"),
    ];
    for (entry, (image, id, decision, reason, cache, priority)) in entries.iter().zip(expected) {
        for (field, value) in [
            ("MESSAGE_ID", id),
            ("PRIORITY", priority),
            ("SYSLOG_IDENTIFIER", "pullgate"),
            ("PULLGATE_DECISION", decision),
            ("PULLGATE_REASON", reason),
            ("PULLGATE_IMAGE", &image.by_tag()),
            ("PULLGATE_DIGEST", &image.digest),
            ("PULLGATE_RULE", "the-rule"),
            ("PULLGATE_KEY_ID", "file:///etc/pullgate/keys/ci.pub"),
            ("PULLGATE_CACHE", cache),
            ("K8S_NAMESPACE", "shop"),
            ("K8S_POD", "cart-7d4b9"),
        ] {
            assert_eq!(entry[field], value, "{field} of {entry:#}");
        }
        assert!(entry["K8S_POD_UID"].as_str().is_some_and(|uid| uid.starts_with("pgt-")), "{entry:#}");
        let number = |field: &str| entry[field].as_str().and_then(|text| text.parse::<u64>().ok());
        assert!(number("PULLGATE_DURATION_US").is_some_and(|took| took < 60_000_000), "{entry:#}");
        assert_eq!(entry["PULLGATE_POLICY"], entries[0]["PULLGATE_POLICY"]);
        assert!(entry["PULLGATE_POLICY"].as_str().is_some_and(|policy| !policy.is_empty()));
    }
    assert_eq!(entries[1]["MESSAGE"], refusal.message(), "the kubelet was told the same");

    let explained = ["journalctl", "--catalog", "--no-pager", "_SYSTEMD_UNIT=pullgate.service"];
    let explained = node.machine.run_ok(&explained).await?;
    for text in [
        format!("Subject: Image {} was allowed", signed.by_tag()),
        format!("Subject: Image {} was denied", unsigned.by_tag()),
        "Subject: A policy came into force".to_owned(),
        "Support: man:pullgate(1)".to_owned(),
    ] {
        assert!(explained.contains(&text), "no {text} in {explained}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_swaps_the_policy_and_a_bad_file_leaves_it() -> Result<()> {
    let node = Node::start().await?;
    let pid = node.main_pid().await?;
    let image = Image::new("unsigned").push(&node.world.registry).await?;
    node.cri.pull(&image.by_tag()).await.err().context("it was pulled")?;
    let first = node.journal(1, &[&format!("MESSAGE_ID={POLICY_LOADED}")]).await?;

    // The file is watched, too: journal entries are counted from the last one.
    node.configure("strategy: allow")?;
    node.machine.run_ok(&["systemctl", "reload", SERVICE]).await?;
    let loaded = node.journal(2, &[&format!("MESSAGE_ID={POLICY_LOADED}")]).await?;
    assert_ne!(loaded[1]["PULLGATE_POLICY"], first[0]["PULLGATE_POLICY"]);
    node.is_active().await?;
    node.cri.pull(&image.by_tag()).await?;

    node.configure("strategy: alow")?;
    let failed = node.machine.run(&["systemctl", "reload", SERVICE]).await?;
    assert_ne!(failed.status.code(), Some(0), "whoever reloads a bad file is told");
    let refused = node.journal(1, &[&format!("MESSAGE_ID={POLICY_REFUSED}")]).await?;
    assert_eq!(refused[0]["PRIORITY"], "3");
    assert_eq!(refused[0]["PULLGATE_POLICY"], loaded[1]["PULLGATE_POLICY"], "the one that stays");
    assert!(refused[0]["MESSAGE"].as_str().is_some_and(|text| text.contains("alow")), "{refused:?}");
    node.is_active().await?;
    node.cri.pull(&image.by_tag()).await?;
    assert_eq!(node.main_pid().await?, pid, "it is the same process");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_made_while_it_is_dead_is_answered_after_the_restart() -> Result<()> {
    let node = Node::start().await?;
    let image = node.signed("app").await?;
    node.cri.pull(&image.by_tag()).await?;
    let (socket, pid) = (node.machine.path("/run/pullgate/pullgate.sock"), node.main_pid().await?);
    let inode =
        |path: &Path| Ok::<_, std::io::Error>(std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path)?));
    let before = inode(&socket)?;

    let kill = ["systemctl", "kill", "--kill-whom=main", "--signal=KILL", SERVICE];
    node.machine.run_ok(&kill).await?;
    wait::until("it to be dead", wait::LONG, async || Ok((node.main_pid().await? == "0").then_some(())))
        .await?;
    // Nobody is there to answer: the call waits in the socket that systemd keeps open.
    let cri = node.world.containerd.cri_through(&socket)?;
    cri.pull(&image.by_tag()).await?;
    assert_ne!(node.main_pid().await?, pid);
    assert_eq!(node.machine.property(SERVICE, "NRestarts").await?, "1");
    assert_eq!(inode(&socket)?, before, "it is the same socket");
    let entries = node.journal(2, &["PULLGATE_METHOD=PullImage"]).await?;
    assert_eq!(entries[1]["PULLGATE_CACHE"], "disk", "the verdict outlived the crash");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_watchdog_restarts_a_daemon_that_hangs() -> Result<()> {
    let node = Node::boot().await?;
    node.machine.write(
        "/etc/systemd/system/pullgate.service.d/watchdog.conf",
        "[Service]\nWatchdogSec=2\nTimeoutAbortSec=2\n",
    )?;
    node.machine.run_ok(&["systemctl", "daemon-reload"]).await?;
    node.machine.run_ok(&["systemctl", "start", "pullgate.socket", SERVICE]).await?;
    let pid = node.main_pid().await?;
    // It is fed while all is well: systemd has heard of it after the start.
    let heard = async || node.machine.property(SERVICE, "WatchdogTimestampMonotonic").await;
    let first = heard().await?;
    wait::until("the watchdog to be fed", wait::LONG, async || Ok((heard().await? != first).then_some(())))
        .await?;
    assert_eq!(node.main_pid().await?, pid);

    node.machine.run_ok(&["systemctl", "kill", "--kill-whom=main", "--signal=STOP", SERVICE]).await?;
    // The kubelet's calls wait, and are answered by the next process.
    let images = node.cri.list_images().await;
    wait::until("a restart", wait::LONG, async || {
        let now = node.main_pid().await?;
        Ok((now != pid && now != "0").then_some(()))
    })
    .await?;
    node.is_active().await?;
    let told = node.machine.run_ok(&["journalctl", "--no-pager", "--unit", SERVICE]).await?;
    assert!(told.contains("Watchdog timeout"), "{told}");
    // A call in flight ended with the process; none may be answered wrongly.
    if let Err(status) = images {
        assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    }
    node.cri.list_images().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_lets_a_pull_finish_while_new_calls_wait() -> Result<()> {
    let node = Node::start().await?;
    let (slow, pid) = (node.signed("slow").await?, node.main_pid().await?);
    let gate = Gate::new();
    node.world.registry.proxy.inject(Rule::on("/v2/slow/blobs/*", Fault::Hold(gate.clone())));
    let pull = tokio::spawn({
        let (cri, name) = (node.cri.clone(), slow.by_tag());
        async move { cri.pull(&name).await }
    });
    gate.arrived(1).await?;
    let socket = node.machine.path("/run/pullgate/pullgate.sock");
    let idle = Client::connect(&socket).await?;
    idle.call("runtime.v1.ImageService/ListImages", &[], &[]).await?;
    node.machine.run_ok(&["systemctl", "restart", "--no-block", SERVICE]).await?;
    // It says so to a connection at rest once it takes no new ones.
    wait::until_true("GOAWAY", || idle.is_closed()).await?;
    assert_eq!(node.machine.property(SERVICE, "ActiveState").await?, "deactivating");
    // A new connection is systemd's to keep until the next process is there.
    let waiting = tokio::spawn({
        let cri = node.world.containerd.cri_through(&socket)?;
        async move { cri.list_images().await }
    });
    assert_eq!(node.main_pid().await?, pid, "the old process still works on the pull");
    assert!(!pull.is_finished() && !waiting.is_finished());
    gate.open();
    assert_eq!(pull.await??, slow.config_digest);
    assert!(waiting.await??.iter().any(|image| image.id == slow.config_digest));
    node.is_active().await?;
    assert_ne!(node.main_pid().await?, pid);

    // And a plain stop ends it for good, cleanly.
    node.machine.run_ok(&["systemctl", "stop", "pullgate.socket", SERVICE]).await?;
    assert_eq!(node.machine.property(SERVICE, "Result").await?, "success");
    assert_eq!(node.machine.property(SERVICE, "ExecMainStatus").await?, "0");
    assert!(!node.machine.path("/run/pullgate/pullgate.sock").exists());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_units_are_sound_and_the_catalog_knows_every_event() -> Result<()> {
    let world = World::start().await?;
    let machine = Nspawn::boot(&world).await?;
    // containerd and the kubelet are not installed here, and a manual page is not needed.
    let units = ["/etc/systemd/system/pullgate.service", "/etc/systemd/system/pullgate.socket"];
    let verified =
        machine.run(&[&["systemd-analyze", "verify", "--man=no"], units.as_slice()].concat()).await?;
    assert!(verified.status.success(), "{verified:?}");
    let complaints = verified.stderr.lines().find(|line| line.contains("pullgate"));
    assert_eq!(complaints, None, "{verified:?}");
    println!("{}", machine.run_ok(&["systemd-analyze", "security", "--no-pager", SERVICE]).await?);

    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../daemon/src/audit/mod.rs");
    let source = std::fs::read_to_string(source)?;
    let ids: Vec<&str> =
        source.split('"').filter(|text| text.starts_with("5d1b3cf0ab7e4f0c8f2f3cb1c2f5d8")).collect();
    assert!(ids.len() >= 9, "{ids:?}");
    let catalog = machine.run_ok(&["journalctl", "--list-catalog"]).await?;
    for id in ids {
        assert!(catalog.lines().any(|line| line.starts_with(id)), "no text for {id} in the catalog");
    }
    Ok(())
}

/// What only passes never waits for a decision, nor for the journal that a decision waits for.
#[tokio::test(flavor = "multi_thread")]
async fn while_the_journal_hangs_what_only_passes_goes_on() -> Result<()> {
    let node = Node::start().await?;
    let image = Image::new("unsigned").push(&node.world.registry).await?;
    let journald = |signal: &'static str| {
        let machine = &node.machine;
        async move { machine.run_ok(&["systemctl", "kill", signal, "systemd-journald.service"]).await.map(drop) }
    };
    journald("--signal=STOP").await?;
    // More than the journal's socket holds: sooner or later one waits.
    let pulls: Vec<_> = (0..600)
        .map(|_| {
            let (cri, name) = (node.cri.clone(), image.by_tag());
            tokio::spawn(async move { cri.pull(&name).await.is_err() })
        })
        .collect();
    wait::until("pulls to wait for the journal", wait::LONG, async || {
        let waiting = pulls.iter().filter(|pull| !pull.is_finished()).count();
        let before = pulls.len() - waiting;
        node.cri.list_images().await?;
        Ok((before > 0 && waiting > 0 && before == pulls.iter().filter(|pull| pull.is_finished()).count())
            .then_some(()))
    })
    .await?;
    for _ in 0..20 {
        tokio::time::timeout(wait::LONG, node.cri.list_images()).await??;
    }
    journald("--signal=CONT").await?;
    for pull in pulls {
        assert!(pull.await?, "it was pulled");
    }
    let told = node.journal(600, &["PULLGATE_METHOD=PullImage"]).await?;
    assert_eq!(told.len(), 600, "nothing is lost");
    Ok(())
}
