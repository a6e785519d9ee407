//! Keys: every kind and every spelling, a KMS that is slow, away or wrong, and aliases that move.

use anyhow::{Context, Result, ensure};
use pullgate_tests::process::run_ok;
use pullgate_tests::{
    Cosign, Fault, Gate, Image, KmsKey, Moto, Pullgate, Pushed, Rule, SigTag, Tamper, World, moto, policy,
    refused, wait,
};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// A world with KMS, whose requests by pullgate are counted, and cosign.
struct Keys {
    world: World,
    cosign: Cosign,
}

/// An alias that is to be re-pointed.
struct Moving {
    old: KmsKey,
    new: KmsKey,
    alias: String,
}

impl Keys {
    async fn start() -> Result<Self> {
        let world = World::start().await?;
        world.moto().await?;
        let cosign = world.cosign().await?;
        Ok(Self { world, cosign })
    }

    async fn moto(&self) -> Result<&Moto> {
        self.world.moto().await
    }

    async fn pullgate(&self, key: &str, more: &str) -> Result<Pullgate> {
        let rules = policy::signed(&self.world.registry, key);
        Pullgate::start(&self.world, &format!("{more}\n{rules}")).await
    }

    fn glob(&self, repository: &str) -> String {
        format!("{}/{repository}", self.world.registry.host())
    }

    async fn unsigned(&self, name: &str) -> Result<Pushed> {
        Image::new(name).push(&self.world.registry).await
    }

    /// An image that a key in KMS signed; the requests so far are forgotten.
    async fn signed(&self, name: &str, key: &KmsKey) -> Result<Pushed> {
        let image = self.unsigned(name).await?;
        self.cosign.sign(&key.cosign_uri(), &image.by_digest()).await?;
        self.moto().await?.proxy.forget();
        Ok(image)
    }

    /// Two keys, and an alias that points at the first.
    async fn moving_alias(&self, name: &str) -> Result<Moving> {
        let moto = self.moto().await?;
        let (old, new) = (moto.create_key("ECC_NIST_P256").await?, moto.create_key("ECC_NIST_P256").await?);
        let alias = format!("alias/{name}-{}", old.id);
        moto.create_alias(&alias, &old).await?;
        Ok(Moving { old, new, alias })
    }

    fn signature(&self, image: &Pushed) -> SigTag {
        SigTag::of(&self.world.registry.oci(), image)
    }

    /// How often KMS was asked for this.
    async fn asked(&self, operation: &str) -> Result<usize> {
        let target = format!("TrentService.{operation}");
        Ok(self.moto().await?.proxy.count_header("x-amz-target", &target))
    }

    /// From now on, one operation of KMS goes wrong.
    async fn spoil(&self, operation: &str, fault: Fault) -> Result<()> {
        let rule = Rule::on("*", fault).header("x-amz-target", &format!("TrentService.{operation}"));
        self.moto().await?.proxy.inject(rule);
        Ok(())
    }

    async fn heal(&self) -> Result<()> {
        self.moto().await?.proxy.heal();
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kms_keys_of_every_spec_verify_their_own_images_only() -> Result<()> {
    let keys = Keys::start().await?;
    let mut all = Vec::new();
    for spec in moto::SPECS {
        all.push((spec.to_lowercase().replace('_', "-"), keys.moto().await?.create_key(spec).await?));
    }
    let rules: Vec<_> = all
        .iter()
        .map(|(name, key)| policy::rule_for(&keys.glob(&format!("{name}/**")), &key.uri(), ""))
        .collect();
    let pullgate = Pullgate::start(&keys.world, &policy::rules(&rules)).await?;
    for (number, (name, key)) in all.iter().enumerate() {
        let image = keys.signed(&format!("{name}/good"), key).await?;
        pullgate.cri().pull(&image.by_tag()).await.with_context(|| name.clone())?;
        let entry = pullgate.audited(|e| e["PULLGATE_DIGEST"] == *image.digest).await?;
        assert_eq!(entry["PULLGATE_REASON"], "signed");
        assert_eq!(entry["PULLGATE_KEY_ID"], key.uri());

        let tampered = keys.signed(&format!("{name}/tampered"), key).await?;
        keys.signature(&tampered).tamper(Tamper::SignatureBit).await?;
        refused(&pullgate, &tampered.by_tag(), "invalid-signature").await?;

        let (_, other) = &all[(number + 1) % all.len()];
        let foreign = keys.signed(&format!("{name}/foreign"), other).await?;
        refused(&pullgate, &foreign.by_tag(), "invalid-signature").await?;
    }
    Ok(())
}

/// One key in KMS, in all the ways in which a rule may name it.
#[tokio::test(flavor = "multi_thread")]
async fn every_spelling_of_a_key_uri_names_the_key() -> Result<()> {
    let keys = Keys::start().await?;
    let moto = keys.moto().await?;
    let key = moto.create_key("ECC_NIST_P256").await?;
    let alias = format!("alias/spelled-{}", key.id);
    let alias_arn = moto.create_alias(&alias, &key).await?;
    let pem = moto.public_key(&key).await?;
    let file = keys.world.folder("pem")?.join("ci.pem");
    std::fs::write(&file, &pem)?;
    let spellings = [
        ("kms-arn", key.uri()),
        ("kms-alias-arn", format!("aws-kms://{alias_arn}")),
        ("cosign-arn", format!("awskms:///{}", key.arn)),
        ("cosign-id", format!("awskms:///{}", key.id)),
        ("cosign-alias", format!("awskms:///{alias}")),
        ("cosign-alias-arn", format!("awskms:///{alias_arn}")),
        ("file", format!("file://{}", file.display())),
        ("inline", pem),
    ];
    let rules = spellings.clone().map(|(name, uri)| policy::rule_for(&keys.glob(name), &uri, ""));
    let pullgate = Pullgate::start(&keys.world, &policy::rules(&rules)).await?;
    let stranger = keys.cosign.generate_key("stranger").await?;
    for (name, _) in &spellings {
        let image = keys.signed(name, &key).await?;
        pullgate.cri().pull(&image.by_tag()).await.with_context(|| (*name).to_owned())?;
        let foreign = keys.unsigned(name).await?;
        keys.cosign.sign(&stranger.key(), &foreign.by_digest()).await?;
        refused(&pullgate, &foreign.by_digest(), "invalid-signature").await?;
    }
    let keys_used: std::collections::BTreeSet<String> = pullgate
        .audit()
        .iter()
        .filter(|entry| entry["PULLGATE_DECISION"] == "allow")
        .map(|entry| entry["PULLGATE_KEY_SHA256"].to_string())
        .collect();
    assert_eq!(keys_used.len(), 1, "{keys_used:?}");
    Ok(())
}

/// A key pair that openssl made, since cosign 2 imports few kinds.
struct OpensslKey {
    private: PathBuf,
    public: PathBuf,
}

impl OpensslKey {
    async fn make(keys: &Keys, algorithm: &[&str]) -> Result<Self> {
        let folder = keys.world.folder("o")?;
        let key = Self { private: folder.join("key.pem"), public: folder.join("pub.pem") };
        let mut openssl = Command::new("openssl");
        run_ok_with(openssl.arg("genpkey").args(algorithm).arg("-out").arg(&key.private)).await?;
        let mut openssl = Command::new("openssl");
        run_ok_with(openssl.args(["pkey", "-pubout", "-in"]).arg(&key.private).arg("-out").arg(&key.public))
            .await?;
        Ok(key)
    }

    async fn sign(&self, message: &[u8], options: &[&str]) -> Result<Vec<u8>> {
        let (input, output) = (self.private.with_file_name("in"), self.private.with_file_name("out"));
        std::fs::write(&input, message)?;
        let mut openssl = Command::new("openssl");
        openssl
            .arg("dgst")
            .args(options)
            .arg("-sign")
            .arg(&self.private)
            .arg("-out")
            .arg(&output)
            .arg(&input);
        run_ok_with(&mut openssl).await?;
        Ok(std::fs::read(output)?)
    }
}

async fn run_ok_with(command: &mut Command) -> Result<()> {
    let owned = std::mem::replace(command, Command::new("true"));
    run_ok(owned).await?;
    Ok(())
}

const PSS: [&str; 5] = ["-sha256", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest"];

#[tokio::test(flavor = "multi_thread")]
async fn file_keys_of_every_kind_verify_with_their_own_hash_only() -> Result<()> {
    let keys = Keys::start().await?;
    let rsa = |bits: &'static str| vec!["-algorithm", "RSA", "-pkeyopt", bits];
    let ec = |curve: &'static str| vec!["-algorithm", "EC", "-pkeyopt", curve];
    let pkcs1 = ["-sha256"].as_slice();
    // The kind; how to make it; a sound signature; one by a hash that does not belong to it.
    let kinds = [
        ("rsa-2048", rsa("rsa_keygen_bits:2048"), pkcs1, "-sha1"),
        ("rsa-3072", rsa("rsa_keygen_bits:3072"), pkcs1, "-sha512"),
        ("rsa-2048-pss", rsa("rsa_keygen_bits:2048"), PSS.as_slice(), "-sha512"),
        ("p-256", ec("ec_paramgen_curve:P-256"), ["-sha256"].as_slice(), "-sha512"),
        ("p-384", ec("ec_paramgen_curve:P-384"), ["-sha384"].as_slice(), "-sha256"),
        ("p-521", ec("ec_paramgen_curve:P-521"), ["-sha512"].as_slice(), "-sha256"),
    ];
    let (mut made, mut rules) = (Vec::new(), Vec::new());
    for (name, algorithm, ..) in &kinds {
        let key = OpensslKey::make(&keys, algorithm).await?;
        let uri = format!("file://{}", key.public.display());
        rules.push(policy::rule_for(&keys.glob(&format!("{name}/**")), &uri, ""));
        made.push(key);
    }
    for algorithm in ["p256", "ed25519"] {
        let pair = keys.cosign.import_key(algorithm, algorithm).await?;
        rules.push(policy::rule_for(&keys.glob(&format!("cosign-{algorithm}/**")), &pair.uri(), ""));
    }
    let pullgate = Pullgate::start(&keys.world, &policy::rules(&rules)).await?;
    for ((name, _, sound, unsound), key) in kinds.iter().zip(&made) {
        let image = keys.unsigned(&format!("{name}/sound")).await?;
        let payload = SigTag::document(&image);
        keys.signature(&image).make(&payload, &key.sign(&payload, sound).await?).await?;
        pullgate.cri().pull(&image.by_tag()).await.with_context(|| (*name).to_owned())?;

        let image = keys.unsigned(&format!("{name}/unsound")).await?;
        let payload = SigTag::document(&image);
        keys.signature(&image).make(&payload, &key.sign(&payload, &[unsound]).await?).await?;
        refused(&pullgate, &image.by_tag(), "invalid-signature").await.with_context(|| (*name).to_owned())?;
    }
    for algorithm in ["p256", "ed25519"] {
        let image = keys.unsigned(&format!("cosign-{algorithm}/sound")).await?;
        let private = keys.cosign.pair(algorithm).key();
        keys.cosign.sign(&private, &image.by_digest()).await?;
        pullgate.cri().pull(&image.by_tag()).await.context(algorithm)?;
        keys.signature(&image).tamper(Tamper::SignatureBit).await?;
        let spoiled = keys.unsigned(&format!("cosign-{algorithm}/spoiled")).await?;
        keys.cosign.sign(&private, &spoiled.by_digest()).await?;
        keys.signature(&spoiled).tamper(Tamper::SignatureBit).await?;
        refused(&pullgate, &spoiled.by_tag(), "invalid-signature").await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pss_signature_by_kms_verifies_here_and_at_kms() -> Result<()> {
    let keys = Keys::start().await?;
    let moto = keys.moto().await?;
    let key = moto.create_key("RSA_2048").await?;
    let rules = policy::rules(&[
        policy::rule_for(&keys.glob("here"), &key.uri(), ""),
        policy::rule_for(&keys.glob("at-kms"), &key.uri(), "remoteVerify: true"),
    ]);
    let pullgate = Pullgate::start(&keys.world, &rules).await?;
    for repository in ["here", "at-kms"] {
        let image = keys.unsigned(repository).await?;
        let payload = SigTag::document(&image);
        let signature = moto.sign(&key, "RSASSA_PSS_SHA_256", &payload).await?;
        keys.signature(&image).make(&payload, &signature).await?;
        pullgate.cri().pull(&image.by_tag()).await.context(repository)?;
        assert_eq!(keys.asked("Verify").await?, usize::from(repository == "at-kms"), "only about PSS");

        let other = keys.unsigned(repository).await?;
        keys.signature(&other).make(&payload, &signature).await?;
        let text = refused(&pullgate, &other.by_digest(), "invalid-signature").await?;
        assert!(text.contains("for another image"), "{text}");
        moto.proxy.forget();
    }
    Ok(())
}

/// `(Region, how often)` that GetPublicKey was asked in it, as the requests' signatures say.
async fn asked_in(keys: &Keys, region: &str) -> Result<usize> {
    let scope = format!("/{region}/kms/");
    let requests = keys.moto().await?.proxy.requests();
    let asked = requests.iter().filter(|seen| {
        seen.header("x-amz-target") == "TrentService.GetPublicKey"
            && seen.header("authorization").contains(&scope)
    });
    Ok(asked.count())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_multi_region_key_is_asked_for_in_the_next_region_while_one_is_down() -> Result<()> {
    let keys = Keys::start().await?;
    let moto = keys.moto().await?;
    let primary = moto.create_key_in("us-east-1", "ECC_NIST_P256", true).await?;
    let replica = moto.replicate_key(&primary, "eu-west-1").await?;
    let single = moto.create_key("ECC_NIST_P256").await?;
    let rules = policy::rules(&[
        policy::rule_for(&keys.glob("single"), &single.uri(), ""),
        policy::rule_for(&keys.glob("multi"), &primary.uri(), ""),
    ]);
    let image = keys.signed("multi", &replica).await?;
    let lonely = keys.signed("single", &single).await?;
    let regions = format!(
        "regions: {{us-east-1: {{kmsEndpoint: \"http://127.0.0.1:1\"}}, eu-west-1: {{kmsEndpoint: \"{}\"}}}}",
        moto.url()
    );

    // The node's own Region has a replica: the primary's Region is never needed.
    let near =
        Pullgate::start(&keys.world, &format!("aws: {{region: eu-west-1, {regions}}}\n{rules}")).await?;
    near.cri().pull(&image.by_tag()).await.context("own Region")?;
    assert_eq!(asked_in(&keys, "eu-west-1").await?, 1);
    assert_eq!(near.metric("pullgate_kms_requests_total", &["outcome=\"kms-unavailable\""]).await?, 0.0);
    let text = refused(&near, &lonely.by_tag(), "kms-unavailable").await?;
    assert!(text.contains(&single.arn) && text.contains("can't be reached"), "{text}");
    near.stop().await?;

    // The node's own Region is down: the replicas are asked next.
    keys.world.cri()?.remove_image(&image.by_tag()).await?;
    moto.proxy.forget();
    let aws = format!("aws: {{region: us-east-1, replicaRegions: [eu-west-1], {regions}}}");
    let far = Pullgate::start(&keys.world, &format!("{aws}\n{rules}")).await?;
    far.cri().pull(&image.by_tag()).await.context("the next Region")?;
    assert_eq!(asked_in(&keys, "eu-west-1").await?, 1);
    assert_eq!(far.metric("pullgate_kms_requests_total", &["outcome=\"kms-unavailable\""]).await?, 1.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_throttled_kms_is_no_verdict_and_the_next_pull_works() -> Result<()> {
    let keys = Keys::start().await?;
    let key = keys.moto().await?.create_key("ECC_NIST_P256").await?;
    let image = keys.signed("app", &key).await?;
    let pullgate = keys.pullgate(&key.uri(), "").await?;
    keys.spoil("GetPublicKey", Fault::aws(400, "ThrottlingException")).await?;
    let first = refused(&pullgate, &image.by_tag(), "kms-throttled").await?;
    assert_eq!(keys.asked("GetPublicKey").await?, 3, "it is tried again, but not for ever");
    let second = refused(&pullgate, &image.by_tag(), "kms-throttled").await?;
    assert_eq!(first, second, "the same cause has the same text");
    assert_eq!(pullgate.verdicts().await?, 0);

    // Once is waited out within the pull.
    keys.heal().await?;
    let once = Rule::on("*", Fault::aws(400, "ThrottlingException")).header("x-amz-target", "GetPublicKey");
    keys.moto().await?.proxy.inject(once.times(1));
    pullgate.cri().pull(&image.by_tag()).await?;
    assert_eq!(pullgate.verdicts().await?, 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn kms_away_at_the_start_is_a_failure_that_passes_without_a_restart() -> Result<()> {
    let keys = Keys::start().await?;
    let key = keys.moto().await?.create_key("ECC_NIST_P256").await?;
    let image = keys.signed("app", &key).await?;
    keys.moto().await?.proxy.inject(Rule::on("*", Fault::Reset));
    let pullgate = keys.pullgate(&key.uri(), "").await?;
    let (pid, text) = (pullgate.pid(), refused(&pullgate, &image.by_tag(), "kms-unavailable").await?);
    assert!(text.contains("KMS can't be reached"), "{text}");
    assert_eq!(pullgate.verdicts().await?, 0);
    keys.heal().await?;
    pullgate.cri().pull(&image.by_tag()).await?;
    assert_eq!(pullgate.pid(), pid);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pinned_key_works_while_kms_is_away_after_a_restart_too() -> Result<()> {
    let keys = Keys::start().await?;
    let key = keys.moto().await?.create_key("ECC_NIST_P256").await?;
    let (first, second) = (keys.signed("first", &key).await?, keys.signed("second", &key).await?);
    let foreign = keys.unsigned("foreign").await?;
    let stranger = keys.cosign.generate_key("stranger").await?;
    keys.cosign.sign(&stranger.key(), &foreign.by_digest()).await?;
    let pullgate = keys.pullgate(&key.uri(), "").await?;
    pullgate.cri().pull(&first.by_tag()).await?;

    keys.moto().await?.proxy.inject(Rule::on("*", Fault::Reset));
    pullgate.restart().await?;
    pullgate.cri().pull(&second.by_tag()).await?;
    refused(&pullgate, &foreign.by_tag(), "invalid-signature").await?;
    assert_eq!(keys.moto().await?.proxy.requests().len(), 1, "one GetPublicKey in all");
    assert_eq!(keys.asked("GetPublicKey").await?, 1);
    Ok(())
}

/// What `pullgate keys list` says of the only key.
async fn pin(pullgate: &Pullgate) -> Result<Value> {
    let listed: Value = serde_json::from_str(&pullgate.admin(&["keys", "list"]).await?.ok()?.stdout)?;
    ensure!(listed["keys"].as_array().is_some_and(|keys| keys.len() == 1), "{listed}");
    Ok(listed["keys"][0].clone())
}

fn with_id<'a>(log: &'a [Value], id: &'a str) -> impl Iterator<Item = &'a Value> {
    log.iter().filter(move |entry| entry["MESSAGE_ID"] == id)
}

fn log(pullgate: &Pullgate) -> Vec<Value> {
    pullgate.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

const KEY_CONFLICT: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d804";
const KEY_ACCEPTED: &str = "5d1b3cf0ab7e4f0c8f2f3cb1c2f5d805";

/// Our own reading of cosign (security-lessons): a KMS alias re-pointed at another key.
#[tokio::test(flavor = "multi_thread")]
async fn a_re_pointed_alias_is_refused_until_it_is_pointed_back_or_accepted() -> Result<()> {
    let keys = Keys::start().await?;
    let moto = keys.moto().await?;
    let Moving { old, new, alias } = keys.moving_alias("moving").await?;
    let (by_old, by_new) = (keys.signed("by-old", &old).await?, keys.signed("by-new", &new).await?);
    let uri = format!("awskms:///{alias}");
    let pullgate = keys.pullgate(&uri, "aws: {aliasRecheck: 0s}").await?;
    pullgate.cri().pull(&by_old.by_tag()).await?;
    assert_eq!(pin(&pullgate).await?["conflict"], Value::Null);

    // The thief's key, and what it signed; what the old key signed is not trusted any more either.
    moto.update_alias(&alias, &new).await?;
    let text = refused(&pullgate, &by_new.by_tag(), "untrusted-identity").await?;
    assert!(text.contains("points at another key") && text.contains("pullgate keys accept"), "{text}");
    refused(&pullgate, &by_old.by_tag(), "untrusted-identity").await?;
    assert!(pullgate.cri().image_status(&by_old.by_tag()).await?.is_none(), "present, but refused");
    let entries = log(&pullgate);
    let conflicts: Vec<_> = with_id(&entries, KEY_CONFLICT).collect();
    assert_eq!(conflicts.len(), 1, "told once");
    assert_eq!(conflicts[0]["PRIORITY"], "3");
    let pinned = pin(&pullgate).await?;
    // AWS answers with the ARN, moto with its last part.
    for (field, key) in [("trusted", &old), ("conflict", &new)] {
        assert!(pinned[field]["key_id"].as_str().is_some_and(|id| id.ends_with(&key.id)), "{pinned}");
    }
    assert_eq!(conflicts[0]["FOUND"], pinned["conflict"]["sha256"]);
    assert_eq!(pullgate.metric("pullgate_key_conflicts", &[]).await?, 1.0);

    // Neither a restart nor a KMS that is away makes it good.
    moto.proxy.inject(Rule::on("*", Fault::Reset));
    pullgate.restart().await?;
    assert_eq!(refused(&pullgate, &by_new.by_tag(), "untrusted-identity").await?, text);
    assert_eq!(pullgate.metric("pullgate_key_conflicts", &[]).await?, 1.0, "known from the start");
    moto.proxy.heal();

    moto.update_alias(&alias, &old).await?;
    wait::until("the alias that was pointed back", wait::LONG, async || {
        Ok(pullgate.cri().pull(&by_old.by_tag()).await.ok())
    })
    .await?;
    assert_eq!(pin(&pullgate).await?["conflict"], Value::Null);
    assert_eq!(pullgate.metric("pullgate_key_conflicts", &[]).await?, 0.0);
    refused(&pullgate, &by_new.by_tag(), "invalid-signature").await?;
    let nothing = pullgate.admin(&["keys", "accept", &uri]).await?;
    assert!(!nothing.status.success() && nothing.stderr.contains("key that is trusted"), "{nothing:?}");

    // An operator means it: the new key is the one that counts.
    moto.update_alias(&alias, &new).await?;
    refused(&pullgate, &by_new.by_tag(), "untrusted-identity").await?;
    pullgate.admin(&["keys", "accept", &uri]).await?.ok()?;
    let entries = log(&pullgate);
    assert_eq!(with_id(&entries, KEY_ACCEPTED).count(), 1);
    pullgate.cri().pull(&by_new.by_tag()).await?;
    refused(&pullgate, &by_old.by_tag(), "invalid-signature").await?;
    assert_eq!(pullgate.metric("pullgate_key_conflicts", &[]).await?, 0.0);
    pullgate.restart().await?;
    pullgate.cri().pull(&by_new.by_tag()).await?;
    Ok(())
}

/// A key's id can't be re-pointed, so nobody asks again; an alias is asked for again in its time.
#[tokio::test(flavor = "multi_thread")]
async fn an_alias_is_compared_again_only_after_its_time() -> Result<()> {
    let keys = Keys::start().await?;
    let moto = keys.moto().await?;
    let Moving { old, new, alias } = keys.moving_alias("slow").await?;
    let (one, two) = (keys.signed("one", &old).await?, keys.signed("two", &old).await?);
    let pullgate = keys.pullgate(&format!("awskms:///{alias}"), "aws: {aliasRecheck: 2s}").await?;
    let start = Instant::now();
    pullgate.cri().pull(&one.by_tag()).await?;
    moto.update_alias(&alias, &new).await?;
    let early = pullgate.cri().pull(&two.by_tag()).await;
    if start.elapsed() < Duration::from_secs(2) {
        early.context("within its time the alias is not asked for again")?;
        assert_eq!(keys.asked("GetPublicKey").await?, 1);
    }
    wait::until("the refusal", wait::LONG, async || Ok(pullgate.cri().pull(&two.by_tag()).await.err()))
        .await?;
    refused(&pullgate, &two.by_tag(), "untrusted-identity").await?;
    assert_eq!(keys.asked("GetPublicKey").await?, 2);
    Ok(())
}

/// Between two looks at an alias, KMS must not verify by whatever it points at.
#[tokio::test(flavor = "multi_thread")]
async fn remote_verification_asks_the_pinned_key_and_not_its_alias() -> Result<()> {
    let keys = Keys::start().await?;
    let moto = keys.moto().await?;
    let Moving { old, new, alias } = keys.moving_alias("moved").await?;
    let uri = format!("awskms:///{alias}");
    let rules = policy::rules(&[policy::rule(&keys.world.registry, &uri, "remoteVerify: true")]);
    let pullgate = Pullgate::start(&keys.world, &rules).await?;
    pullgate.cri().pull(&keys.signed("first", &old).await?.by_tag()).await?;
    moto.update_alias(&alias, &new).await?;
    refused(&pullgate, &keys.signed("by-new", &new).await?.by_tag(), "invalid-signature").await?;
    pullgate.cri().pull(&keys.signed("by-old", &old).await?.by_tag()).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn remote_verification_asks_kms_and_believes_it() -> Result<()> {
    let keys = Keys::start().await?;
    let key = keys.moto().await?.create_key("ECC_NIST_P256").await?;
    let rules = policy::rules(&[policy::rule(&keys.world.registry, &key.uri(), "remoteVerify: true")]);
    let good = keys.signed("good", &key).await?;
    let bad = keys.signed("bad", &key).await?;
    keys.signature(&bad).tamper(Tamper::SignatureBit).await?;
    let doubted = keys.signed("doubted", &key).await?;
    let pullgate = Pullgate::start(&keys.world, &rules).await?;

    pullgate.cri().pull(&good.by_tag()).await?;
    pullgate.cri().pull(&good.by_tag()).await?;
    assert_eq!((keys.asked("Verify").await?, keys.asked("GetPublicKey").await?), (1, 1));
    refused(&pullgate, &bad.by_tag(), "invalid-signature").await?;
    assert_eq!(keys.asked("Verify").await?, 1, "what the pinned key does not verify costs no request");
    assert_eq!(pullgate.verdicts().await?, 2, "a bad signature is a verdict");

    keys.spoil("Verify", Fault::aws(400, "ThrottlingException")).await?;
    refused(&pullgate, &doubted.by_tag(), "kms-throttled").await?;
    assert_eq!(pullgate.verdicts().await?, 2, "a throttled KMS is none");
    keys.heal().await?;

    // The signature is good here, but KMS has the last word, and says otherwise.
    keys.spoil("Verify", Fault::aws(400, "KMSInvalidSignatureException")).await?;
    refused(&pullgate, &doubted.by_tag(), "invalid-signature").await?;
    let ok = ["operation=\"Verify\"", "outcome=\"ok\""];
    assert_eq!(pullgate.metric("pullgate_kms_requests_total", &ok).await?, 2.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_key_is_told_by_its_code_and_closes_kms_to_no_other() -> Result<()> {
    let keys = Keys::start().await?;
    let moto = keys.moto().await?;
    let (denied, other) = (moto.create_key("ECC_NIST_P256").await?, moto.create_key("ECC_NIST_P256").await?);
    let rules = policy::rules(&[
        policy::rule_for(&keys.glob("denied"), &denied.uri(), ""),
        policy::rule_for(&keys.glob("other"), &other.uri(), ""),
    ]);
    let (image, fine) = (keys.signed("denied", &denied).await?, keys.signed("other", &other).await?);
    let pullgate = Pullgate::start(&keys.world, &rules).await?;
    // As AWS answers: with ids that differ each time.
    let mut fault = Fault::aws(400, "AccessDeniedException").header("x-amzn-requestid", "request-id-1");
    if let Fault::Status { body, .. } = &mut fault {
        *body = br#"{"__type":"AccessDeniedException","message":"not authorized (request-id-2)"}"#.to_vec();
    }
    keys.spoil("GetPublicKey", fault).await?;
    let mut texts = std::collections::BTreeSet::new();
    for _ in 0..8 {
        texts.insert(refused(&pullgate, &image.by_tag(), "kms-unavailable").await?);
    }
    assert_eq!(texts.len(), 1, "{texts:?}");
    let text = texts.first().context("no text")?;
    assert!(text.contains("GetPublicKey answers AccessDeniedException"), "{text}");
    assert!(!pullgate.log().contains("request-id"));
    assert_eq!(keys.asked("GetPublicKey").await?, 8, "a denial is not tried again within a pull");
    assert_eq!(pullgate.verdicts().await?, 0);

    keys.heal().await?;
    pullgate.cri().pull(&fine.by_tag()).await.context("no breaker has opened")?;
    pullgate.cri().pull(&image.by_tag()).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_breaker_leaves_a_kms_alone_that_is_away() -> Result<()> {
    let keys = Keys::start().await?;
    let moto = keys.moto().await?;
    let (one, two) = (moto.create_key("ECC_NIST_P256").await?, moto.create_key("ECC_NIST_P256").await?);
    let rules = policy::rules(&[
        policy::rule_for(&keys.glob("one"), &one.uri(), ""),
        policy::rule_for(&keys.glob("two"), &two.uri(), ""),
    ]);
    let (first, second) = (keys.signed("one", &one).await?, keys.signed("two", &two).await?);
    let pullgate = Pullgate::start(&keys.world, &rules).await?;
    moto.proxy.inject(Rule::on("*", Fault::aws(500, "KMSInternalException")));
    let open = async || pullgate.metric("pullgate_breakers_open", &["dependency=\"kms\""]).await;
    let first_text = refused(&pullgate, &first.by_tag(), "kms-unavailable").await?;
    assert_eq!((keys.asked("GetPublicKey").await?, open().await?), (3, 0.0));
    refused(&pullgate, &first.by_tag(), "kms-unavailable").await?;
    assert_eq!((keys.asked("GetPublicKey").await?, open().await?), (5, 1.0));

    // While it is open nobody asks, and every key's failure is its own.
    let begin = Instant::now();
    let again = refused(&pullgate, &first.by_tag(), "kms-unavailable").await?;
    let other = refused(&pullgate, &second.by_tag(), "kms-unavailable").await?;
    if begin.elapsed() < Duration::from_millis(700) {
        assert_eq!(keys.asked("GetPublicKey").await?, 5);
    }
    assert_eq!(again, first_text, "the same text, asked or not");
    assert!(other.contains(&two.arn) && !other.contains(&one.arn), "{other}");

    keys.heal().await?;
    wait::until("the breaker to close", wait::LONG, async || {
        Ok(pullgate.cri().pull(&first.by_tag()).await.ok())
    })
    .await?;
    pullgate.cri().pull(&second.by_tag()).await?;
    assert_eq!(open().await?, 0.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn kms_is_asked_no_more_often_than_the_budget_says() -> Result<()> {
    let keys = Keys::start().await?;
    let key = keys.moto().await?.create_key("ECC_NIST_P256").await?;
    let mut images = Vec::new();
    for number in 0..5 {
        images.push(keys.signed(&format!("app-{number}"), &key).await?);
    }
    let rules = policy::rules(&[policy::rule(&keys.world.registry, &key.uri(), "remoteVerify: true")]);
    let pullgate =
        Pullgate::start(&keys.world, &format!("limits: {{kmsRequestsPerSecond: 2}}\n{rules}")).await?;
    let (begin, cri) = (Instant::now(), pullgate.cri());
    let pull = async |image: &Pushed| cri.pull(&image.by_tag()).await;
    let (a, b, c, d, e) = tokio::join!(
        pull(&images[0]),
        pull(&images[1]),
        pull(&images[2]),
        pull(&images[3]),
        pull(&images[4])
    );
    for pulled in [a, b, c, d, e] {
        pulled?;
    }
    // One GetPublicKey and five Verify: two at once, and the other four half a second apart.
    assert_eq!(keys.moto().await?.proxy.requests().len(), 6);
    assert!(begin.elapsed() >= Duration::from_millis(1950), "{:?}", begin.elapsed());
    Ok(())
}

/// The registry is there, KMS is not: a verdict past its time still stands, for the grace.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_allow_verdict_stands_while_kms_is_away() -> Result<()> {
    let keys = Keys::start().await?;
    let key = keys.moto().await?.create_key("ECC_NIST_P256").await?;
    let (image, bad) = (keys.signed("app", &key).await?, keys.signed("bad", &key).await?);
    keys.signature(&bad).tamper(Tamper::SignatureBit).await?;
    let rules = policy::rules(&[policy::rule(&keys.world.registry, &key.uri(), "remoteVerify: true")]);
    let cache =
        |grace: &str| format!("cache: {{positiveTTL: 0s, negativeTTL: 0s, staleGrace: {grace}}}\n{rules}");
    let pullgate = Pullgate::start(&keys.world, &cache("1h")).await?;
    pullgate.cri().pull(&image.by_tag()).await?;
    refused(&pullgate, &bad.by_tag(), "invalid-signature").await?;

    for (fault, reason) in
        [(Fault::Reset, "kms-unavailable"), (Fault::aws(400, "ThrottlingException"), "kms-throttled")]
    {
        keys.spoil("Verify", fault).await?;
        pullgate.cri().pull(&image.by_tag()).await.context(reason)?;
        let entry = pullgate.audited(|e| e["PULLGATE_STALE_BECAUSE"] == reason).await?;
        assert_eq!(
            (&entry["PULLGATE_DECISION"], &entry["PULLGATE_CACHE"]),
            (&"allow".into(), &"stale".into())
        );
        refused(&pullgate, &bad.by_tag(), "invalid-signature").await.context("KMS can't help it")?;
        keys.heal().await?;
        wait::until("KMS again", wait::LONG, async || {
            pullgate.cri().pull(&image.by_tag()).await?;
            Ok(pullgate.audit().last().filter(|entry| entry["PULLGATE_CACHE"] == "miss").cloned())
        })
        .await?;
    }
    assert!(pullgate.metric("pullgate_stale_allows_total", &[]).await? >= 2.0);

    keys.spoil("Verify", Fault::Reset).await?;
    pullgate.stop().await?;
    pullgate.reconfigure(&keys.world, &cache("0s"))?;
    pullgate.start_again().await?;
    refused(&pullgate, &image.by_tag(), "kms-unavailable").await.context("past the grace")?;
    Ok(())
}

/// A KMS that hangs holds up nobody whose key is pinned; what it says in the end still counts.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_kms_holds_up_no_pinned_alias_and_is_heard_in_the_end() -> Result<()> {
    let keys = Keys::start().await?;
    let moto = keys.moto().await?;
    let Moving { old, new, alias } = keys.moving_alias("slow").await?;
    let image = keys.signed("app", &old).await?;
    let pullgate = keys.pullgate(&format!("awskms:///{alias}"), "aws: {aliasRecheck: 0s}").await?;
    pullgate.cri().pull(&image.by_tag()).await?;

    let gate = Gate::new();
    keys.spoil("GetPublicKey", Fault::Hold(gate.clone())).await?;
    moto.update_alias(&alias, &new).await?;
    // Within `imageStatusDeadline`, or it would be absent.
    let status = pullgate.cri().image_status(&image.by_tag()).await?.context("absent")?;
    assert_eq!(status.id, image.config_digest);
    gate.arrived(1).await?;
    gate.open();
    wait::until("the other key to be noticed", wait::LONG, async || {
        Ok(pullgate.cri().image_status(&image.by_tag()).await?.is_none().then_some(()))
    })
    .await?;
    let entry = pullgate.audit().pop().context("no entry")?;
    assert_eq!(entry["PULLGATE_REASON"], "untrusted-identity", "{entry}");
    Ok(())
}
