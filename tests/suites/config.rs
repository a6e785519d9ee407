//! The configuration from outside: mistakes, reloads, and what the command line says of itself.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use pullgate_tests::process::{Output, run, run_ok};
use pullgate_tests::pullgate::binary;
use pullgate_tests::{Cosign, Image, KeyPair, Pullgate, Pushed, World, policy, wait};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const POLICY_REFUSED: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d808";

/// Eight mistakes of different kinds; the lines count.
const BAD: &str = r#"listen: /run/pullgate/x.sock
deadline: 10
mode: enforced
cashe: {positiveTTL: 12h}
cache:
  positiveTTL: 12x
  negativeTTL: 30s
verificationRules:
  - imageGlob: "a.example.com/**"
    strategy: signd
  - imageGlob: "b.example.com/**"
    strategy: signed
  - imageGlob: "b.example.com/x"
    strategy: deny
  - imageGlob: "Capital.example.com/[x"
    strategy: deny
"#;

/// Where each of them is, and a part of what is said about it.
const MISTAKES: [(&str, &str); 8] = [
    ("2:11", "deadline"),
    ("3:7", "mode"),
    ("4:1", "cashe"),
    ("6:16", "cache.positiveTTL"),
    ("10:15", "verificationRules[0].strategy"),
    ("11:5", "verificationRules[1].keyURI"),
    ("13:16", "verificationRules[2].imageGlob"),
    ("15:16", "verificationRules[3].imageGlob"),
];

async fn pullgate(args: &[&str]) -> Result<Output> {
    let mut command = Command::new(binary()?);
    command.args(args).env_remove("PULLGATE_CONFIG").env("PULLGATE_LOG", "json");
    run(command).await
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("not UTF-8")
}

/// Every mistake is told with its place and a remedy.
fn tells_every_mistake(file: &Path, told: &str) {
    for (place, about) in MISTAKES {
        let head = format!("{}:{place}: {about}", file.display());
        let mut lines = told.lines().skip_while(|line| !line.contains(&head));
        assert!(lines.next().is_some(), "no `{head}` in:\n{told}");
        let help = lines.next().unwrap_or_default();
        assert!(help.starts_with("  help: "), "no help after `{head}` in:\n{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn check_config_tells_every_mistake_at_once() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("config.yaml");
    std::fs::write(&file, BAD)?;
    for args in [&["check-config", "--config", text(&file)?][..], &["check-config", text(&file)?]] {
        let checked = pullgate(args).await?;
        assert_eq!(checked.status.code(), Some(2), "{checked:?}");
        assert_eq!(checked.stdout, "");
        tells_every_mistake(&file, &checked.stderr);
        let count = checked.stderr.lines().filter(|line| line.starts_with("error: ")).count();
        assert_eq!(count, MISTAKES.len(), "nothing else is wrong:\n{}", checked.stderr);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_does_not_start_with_a_bad_file_and_says_the_same() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("config.yaml");
    std::fs::write(&file, BAD)?;
    let checked = pullgate(&["check-config", "--config", text(&file)?]).await?;
    let ran = pullgate(&["run", "--config", text(&file)?]).await?;
    assert_eq!(ran.status.code(), Some(2), "{ran:?}");
    tells_every_mistake(&file, &ran.stderr);
    assert!(ran.stderr.ends_with(&checked.stderr), "not the same:\n{}\n{}", ran.stderr, checked.stderr);

    let missing = folder.path().join("missing.yaml");
    for command in ["run", "check-config"] {
        let ran = pullgate(&[command, "--config", text(&missing)?]).await?;
        assert_eq!(ran.status.code(), Some(2), "{ran:?}");
        assert!(ran.stderr.contains(text(&missing)?), "{ran:?}");
    }
    Ok(())
}

/// A world, a key pair, a signed image, and a daemon that requires the signature.
struct Guarded {
    pullgate: Pullgate,
    signed: Pushed,
    unsigned: Pushed,
    key: KeyPair,
    cosign: Cosign,
    world: World,
}

impl Guarded {
    async fn start() -> Result<Self> {
        let world = World::start().await?;
        let cosign = world.cosign().await?;
        let key = cosign.generate_key("ci").await?;
        let signed = Image::new("signed").push(&world.registry).await?;
        cosign.sign(&key.key(), &signed.by_digest()).await?;
        let unsigned = Image::new("unsigned").push(&world.registry).await?;
        let pullgate = Pullgate::start(&world, &policy::signed(&world.registry, &key.uri())).await?;
        Ok(Self { pullgate, signed, unsigned, key, cosign, world })
    }

    fn strict(&self) -> String {
        policy::signed(&self.world.registry, &self.key.uri())
    }

    fn open(&self) -> String {
        policy::rules(&[format!("{{imageGlob: \"{}/**\", strategy: allow}}", self.world.registry.host())])
    }

    /// The policy in force asks for signatures.
    async fn is_strict(&self) -> Result<()> {
        self.pullgate.cri().pull(&self.signed.by_tag()).await?;
        let refused = self.pullgate.cri().pull(&self.unsigned.by_tag()).await;
        let status = refused.err().context("an unsigned image was pulled")?;
        ensure!(status.message().contains(": unsigned: "), "{status}");
        Ok(())
    }

    /// The policy in force allows everything.
    async fn is_open(&self) -> Result<()> {
        self.pullgate.cri().pull(&self.unsigned.by_tag()).await?;
        Ok(())
    }

    async fn reloads(&self, outcome: &str) -> Result<f64> {
        let label = format!("outcome=\"{outcome}\"");
        self.pullgate.metric("pullgate_config_reloads_total", &[&label]).await
    }

    /// Does something, and waits for the reload that comes of it.
    async fn reload(&self, outcome: &str, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = self.reloads(outcome).await?;
        change()?;
        wait::until(&format!("a reload that is {outcome}"), wait::LONG, async || {
            Ok((self.reloads(outcome).await? > before).then_some(()))
        })
        .await
        .with_context(|| self.pullgate.log())
    }

    /// Waits until nothing that happened before makes the daemon look at its files any more.
    async fn comes_to_rest(&self) -> Result<()> {
        let tasks = PathBuf::from(format!("/proc/{}/task", self.pullgate.pid()));
        let watcher = std::fs::read_dir(&tasks)?.flatten().map(|task| task.path()).find(|task| {
            std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("notify"))
        });
        let status = watcher.context("no thread watches")?.join("status");
        let wakes = || -> Result<u64> {
            let text = std::fs::read_to_string(&status)?;
            let line = text.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            Ok(line.context("no count")?.trim().parse()?)
        };
        wait::until("a second without an event", wait::LONG, async || {
            let before = wakes()?;
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok((wakes()? == before).then_some(()))
        })
        .await
    }

    async fn status(&self) -> Result<Value> {
        let socket = self.pullgate.socket().with_file_name("a");
        // Named, because the configuration that names it may be bad.
        let told = self.pullgate.admin(&["status", "--output", "json", "--admin", text(&socket)?]).await?;
        Ok(serde_json::from_str(&told.ok()?.stdout)?)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_and_a_new_file_reload_the_policy() -> Result<()> {
    let guarded = Guarded::start().await?;
    let pid = guarded.pullgate.pid();
    guarded.is_strict().await?;
    // Nothing has changed: only the signal can be the cause.
    guarded.reload("ok", || guarded.pullgate.signal(Signal::SIGHUP)).await?;
    guarded.is_strict().await?;
    // Replaced by rename, as editors and configuration management do it; no signal.
    guarded.reload("ok", || guarded.pullgate.reconfigure(&guarded.world, &guarded.open())).await?;
    guarded.is_open().await?;
    // Written in place.
    let file = guarded.pullgate.config();
    let text = std::fs::read_to_string(&file)?.replace("strategy: allow", "strategy: deny");
    guarded.reload("ok", || Ok(std::fs::write(&file, text)?)).await?;
    let status =
        guarded.pullgate.cri().pull(&guarded.signed.by_tag()).await.err().context("it was pulled")?;
    assert!(status.message().contains(": deny-rule: "), "{status}");
    assert_eq!(guarded.pullgate.pid(), pid, "it is the same process");
    Ok(())
}

/// The kubelet projects a ConfigMap so: a dated folder, `..data` that points at it and is replaced by
/// rename, and links by way of `..data`; the old folder is removed.
#[tokio::test(flavor = "multi_thread")]
async fn a_config_map_that_is_swapped_reloads_the_policy() -> Result<()> {
    let guarded = Guarded::start().await?;
    let file = guarded.pullgate.config();
    let folder = file.parent().context("no folder")?.to_owned();
    let strict = std::fs::read_to_string(&file)?;
    let open = strict.replace(&guarded.strict(), &guarded.open());
    ensure!(strict != open, "the rules were not found");
    let project = |date: &str, text: &str| -> Result<()> {
        let dated = folder.join(date);
        std::fs::create_dir(&dated)?;
        std::fs::write(dated.join("config.yaml"), text)?;
        let new = folder.join("..data_tmp");
        std::os::unix::fs::symlink(date, &new)?;
        let old = std::fs::read_link(folder.join("..data")).ok();
        std::fs::rename(new, folder.join("..data"))?;
        old.map_or(Ok(()), |old| Ok(std::fs::remove_dir_all(folder.join(old))?))
    };
    guarded.pullgate.stop().await?;
    std::fs::remove_file(&file)?;
    project("..2026_11_21_1", &strict)?;
    std::os::unix::fs::symlink("..data/config.yaml", &file)?;
    guarded.pullgate.start_again().await?;
    guarded.is_strict().await?;
    guarded.reload("ok", || project("..2026_11_21_2", &open)).await?;
    guarded.is_open().await?;
    guarded.reload("ok", || project("..2026_11_21_3", &strict)).await?;
    guarded.is_strict().await?;
    guarded.reload("refused", || project("..2026_11_21_4", BAD)).await?;
    guarded.is_strict().await?;
    guarded.reload("ok", || project("..2026_11_21_5", &open)).await?;
    guarded.is_open().await
}

/// Configuration management that keeps the file elsewhere, and a folder that is replaced as a whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_link_s_target_and_a_replaced_folder_are_watched() -> Result<()> {
    let guarded = Guarded::start().await?;
    let file = guarded.pullgate.config();
    let folder = guarded.world.folder("elsewhere")?;
    let strict = std::fs::read_to_string(&file)?;
    let open = strict.replace(&guarded.strict(), &guarded.open());
    let target = folder.join("real.yaml");
    std::fs::write(&target, &open)?;
    let link = || -> Result<()> {
        let new = file.with_extension("new");
        std::os::unix::fs::symlink(&target, &new)?;
        Ok(std::fs::rename(new, &file)?)
    };
    guarded.reload("ok", link).await?;
    guarded.is_open().await?;
    guarded.comes_to_rest().await?;
    guarded.reload("ok", || Ok(std::fs::write(&target, &strict)?)).await?;
    guarded.is_strict().await?;
    guarded.comes_to_rest().await?;
    let replace = || -> Result<()> {
        std::fs::rename(&folder, folder.with_extension("old"))?;
        std::fs::create_dir(&folder)?;
        Ok(std::fs::write(&target, &open)?)
    };
    guarded.reload("ok", replace).await?;
    guarded.is_open().await?;
    guarded.comes_to_rest().await?;
    guarded.reload("ok", || Ok(std::fs::write(&target, &strict)?)).await?;
    guarded.is_strict().await
}

/// Looking at a file is an event, too: who follows those never comes to rest.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_whose_files_do_not_change_does_not_look_at_them_again_and_again() -> Result<()> {
    let guarded = Guarded::start().await?;
    guarded.reload("ok", || guarded.pullgate.reconfigure(&guarded.world, &guarded.open())).await?;
    guarded.comes_to_rest().await
}

#[tokio::test(flavor = "multi_thread")]
async fn reload_waits_for_the_answer_and_says_what_is_wrong() -> Result<()> {
    let guarded = Guarded::start().await?;
    let reload = async || guarded.pullgate.admin(&["reload"]).await;
    let done = reload().await?.ok()?;
    assert!(done.stdout.starts_with("the file is in force, as policy "), "{}", done.stdout);
    guarded.pullgate.reconfigure(&guarded.world, &guarded.open())?;
    reload().await?.ok()?;
    guarded.is_open().await?;

    let socket = guarded.pullgate.socket().with_file_name("a");
    let file = guarded.pullgate.config();
    let good = std::fs::read_to_string(&file)?;
    std::fs::write(&file, BAD)?;
    let refused = guarded.pullgate.admin(&["reload", "--admin", text(&socket)?]).await?;
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    tells_every_mistake(&file, &refused.stderr);
    guarded.is_open().await?;
    std::fs::write(&file, good)?;
    guarded.pullgate.stop().await?;
    assert_eq!(reload().await?.status.code(), Some(3));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_file_leaves_the_old_policy_and_says_so_until_it_is_mended() -> Result<()> {
    let guarded = Guarded::start().await?;
    let ok = async || guarded.pullgate.metric("pullgate_config_last_reload_successful", &[]).await;
    let before = guarded.status().await?;
    assert_eq!((ok().await?, &before["configError"]), (1.0, &Value::Null));

    let bad = "strategy: allow\n".to_owned() + &guarded.open();
    guarded.reload("refused", || guarded.pullgate.reconfigure(&guarded.world, &bad)).await?;
    guarded.is_strict().await?;
    assert_eq!(ok().await?, 0.0);
    let status = guarded.status().await?;
    let error = status["configError"].as_str().context("no configError")?;
    assert!(error.contains(&format!("{}:", guarded.pullgate.config().display())), "{error}");
    assert!(error.contains("strategy"), "{error}");
    assert_eq!(status["policy"], before["policy"]);
    assert!(guarded.pullgate.http("/readyz").await?.status.is_success(), "it goes on");
    let log = guarded.pullgate.log();
    let mut entries = log.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let entry = entries.find(|entry| entry["MESSAGE_ID"] == POLICY_REFUSED).context(log.clone())?;
    assert_eq!((&entry["PRIORITY"], &entry["PULLGATE_POLICY"]), (&"3".into(), &before["policy"]));
    assert!(entry["MESSAGE"].as_str().is_some_and(|message| message.contains(error)), "{entry}");

    // Gone altogether is no better.
    guarded.reload("refused", || Ok(std::fs::remove_file(guarded.pullgate.config())?)).await?;
    guarded.is_strict().await?;

    guarded.reload("ok", || guarded.pullgate.reconfigure(&guarded.world, &guarded.open())).await?;
    guarded.is_open().await?;
    let after = guarded.status().await?;
    assert_eq!((ok().await?, &after["configError"]), (1.0, &Value::Null));
    assert_ne!(after["policy"], before["policy"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_file_that_is_replaced_is_noticed() -> Result<()> {
    let guarded = Guarded::start().await?;
    guarded.is_strict().await?;
    let other = guarded.cosign.generate_key("other").await?;
    let by_other = Image::new("by-other").push(&guarded.world.registry).await?;
    guarded.cosign.sign(&other.key(), &by_other.by_digest()).await?;
    let cri = guarded.pullgate.cri();
    cri.pull(&by_other.by_tag()).await.err().context("it was pulled")?;

    let key = PathBuf::from(&guarded.key.public);
    let replace = |with: &Path| -> Result<()> {
        let new = key.with_extension("new");
        std::fs::copy(with, &new)?;
        Ok(std::fs::rename(new, &key)?)
    };
    guarded.reload("ok", || replace(Path::new(&other.public))).await?;
    cri.pull(&by_other.by_tag()).await.context("by the new key")?;
    let status = cri.pull(&guarded.signed.by_tag()).await.err().context("by the old key")?;
    assert!(status.message().contains(": invalid-signature: "), "{status}");

    // Half of a key is a bad file: what was good stays in force.
    let half = std::fs::read_to_string(&key)?;
    let half = half.get(..half.len() / 2).context("short")?;
    guarded.reload("refused", || Ok(std::fs::write(&key, half)?)).await?;
    cri.pull(&by_other.by_tag()).await?;
    Ok(())
}

/// Configuration management writes files one after the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_file_may_come_after_the_configuration_that_names_it() -> Result<()> {
    let guarded = Guarded::start().await?;
    let key = guarded.world.folder("late")?.join("keys").join("ci.pub");
    let late = policy::signed(&guarded.world.registry, &format!("file://{}", key.display()));
    guarded.reload("refused", || guarded.pullgate.reconfigure(&guarded.world, &late)).await?;
    guarded.is_strict().await?;
    let arrive = || -> Result<()> {
        std::fs::create_dir(key.parent().context("no folder")?)?;
        std::fs::copy(&guarded.key.public, &key)?;
        Ok(())
    };
    guarded.reload("ok", arrive).await?;
    guarded.is_strict().await?;
    assert_eq!(guarded.reloads("refused").await?, 1.0, "what was told is not told again");
    assert_eq!(guarded.status().await?["configError"], Value::Null);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_are_scripts_of_their_shells() -> Result<()> {
    let commands = subcommands(&pullgate(&["--help"]).await?.ok()?.stdout);
    ensure!(commands.len() >= 8, "{commands:?}");
    for (shell, mark) in
        [("bash", "complete -F _pullgate"), ("zsh", "#compdef pullgate"), ("fish", "complete -c pullgate")]
    {
        let script = pullgate(&["completions", shell]).await?.ok()?.stdout;
        assert!(script.contains(mark), "{shell}: {script}");
        for command in &commands {
            assert!(script.contains(command), "{shell} does not complete {command}");
        }
    }
    // bash is on every machine: load the script, and ask it.
    let script = "source <(\"$0\" completions bash); COMP_WORDS=(pullgate check); COMP_CWORD=1; \
                  _pullgate pullgate check ''; echo \"${COMPREPLY[@]}\"";
    let mut bash = Command::new("bash");
    bash.args(["--norc", "-c", script]).arg(binary()?);
    assert_eq!(run_ok(bash).await?.stdout.trim(), "check-config");
    Ok(())
}

/// The names under `Commands:` of a help text.
fn subcommands(help: &str) -> Vec<String> {
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let lines = lines.take_while(|line| line.starts_with("  "));
    let named = lines.filter(|line| !line.starts_with("   "));
    let names = named.filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

/// Every command of the program, `[]` for itself.
async fn commands() -> Result<Vec<Vec<String>>> {
    let mut found = vec![Vec::new()];
    let mut next = 0;
    while let Some(command) = found.get(next).cloned() {
        let help = help_of(&command).await?;
        found.extend(subcommands(&help).into_iter().map(|name| [command.clone(), vec![name]].concat()));
        next += 1;
    }
    Ok(found)
}

async fn help_of(command: &[String]) -> Result<String> {
    let args: Vec<&str> = command.iter().map(String::as_str).chain(["--help"]).collect();
    Ok(pullgate(&args).await?.ok()?.stdout)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_help_has_an_example_that_is_a_command() -> Result<()> {
    let commands = commands().await?;
    ensure!(commands.len() >= 12, "{commands:?}");
    for command in &commands {
        let help = help_of(command).await?;
        let (_, examples) = help.split_once("\nExample").with_context(|| format!("no example:\n{help}"))?;
        let start = format!("  pullgate {}", command.join(" "));
        assert!(examples.lines().any(|line| line.starts_with(start.trim_end())), "no `{start}` in:\n{help}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_man_pages_are_whole_and_render() -> Result<()> {
    let folder = tempfile::tempdir()?;
    pullgate(&["man", text(folder.path())?]).await?.ok()?;
    for command in commands().await? {
        let name = [&["pullgate".to_owned()], command.as_slice()].concat().join("-");
        let page = folder.path().join(format!("{name}.1"));
        let source = std::fs::read_to_string(&page).with_context(|| name.clone())?;
        assert!(source.contains(".SH NAME"), "{source}");
        if Command::new("groff").arg("--version").output().is_err() {
            continue;
        }
        let mut groff = Command::new("groff");
        groff.args(["-man", "-ww", "-Tutf8", "-P-cbou"]).arg(&page);
        let rendered = run_ok(groff).await?;
        assert_eq!(rendered.stderr, "", "{name}");
        assert!(
            rendered.stdout.contains(&name) && rendered.stdout.contains("SYNOPSIS"),
            "{}",
            rendered.stdout
        );
    }
    Ok(())
}

/// The YAML of the documents, each block with where it is.
fn examples() -> Result<Vec<(String, String)>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let docs = std::fs::read_dir(root.join("docs"))?.map(|entry| Ok(entry?.path()));
    let files: Vec<PathBuf> = docs.chain([Ok(root.join("README.md"))]).collect::<Result<_>>()?;
    let mut found = Vec::new();
    for file in files.iter().filter(|file| file.extension().is_some_and(|end| end == "md")) {
        let text = std::fs::read_to_string(file)?;
        for (number, block) in text.split("```yaml\n").skip(1).enumerate() {
            let block = block.split("```").next().unwrap_or_default();
            if block.contains("verificationRules") {
                found.push((format!("{}, YAML block {}", file.display(), number + 1), block.to_owned()));
            }
        }
    }
    Ok(found)
}

/// What documents show must work as it stands. Key files that they name are laid over /etc, for the
/// check alone.
#[tokio::test(flavor = "multi_thread")]
async fn the_documents_show_configurations_that_are_good() -> Result<()> {
    const KEY: &str = "-----BEGIN PUBLIC KEY-----\n\
        MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEwyT0hhp3ITsyKHMBUmuOJTbLwzbn\n\
        4MjeSvALD/aBEQeB31+Szsl6m7iDuoQhwBIf9oS0E5L52rKc/AaZvs2ODQ==\n\
        -----END PUBLIC KEY-----\n";
    let examples = examples()?;
    ensure!(examples.len() >= 2, "{examples:?}");
    for (place, example) in examples {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("config.yaml");
        std::fs::write(&file, &example)?;
        let named =
            example.split("file:///etc/").skip(1).map(|rest| rest.split(['"', '\n', ' ', '}']).next());
        for key in named.flatten() {
            let key = folder.path().join("etc").join(key);
            std::fs::create_dir_all(key.parent().context("no folder")?)?;
            std::fs::write(key, KEY)?;
        }
        std::fs::create_dir_all(folder.path().join("etc"))?;
        let mut check = Command::new("unshare");
        let script = "mount -t overlay none -o \"lowerdir=$1/etc:/etc\" /etc && exec \"$2\" check-config \"$1/config.yaml\"";
        check.args(["--mount", "sh", "-c", script, "sh"]).arg(folder.path()).arg(binary()?);
        let checked = run(check).await?;
        assert!(checked.status.success(), "{place}: {checked:?}");
        assert!(checked.stdout.contains(": good, "), "{place}: {checked:?}");
        assert_eq!(checked.stderr, "", "{place} has warnings");
    }
    Ok(())
}
