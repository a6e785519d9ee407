//! The edges: what goes through byte for byte, what is refused, who may speak, and what happens when
//! the neighbours, or pullgate itself, go away and come back.

use anyhow::{Context, Result};
use bytes::Bytes;
use hyper::HeaderMap;
use hyper::body::Frame;
use nix::sys::signal::Signal;
use prost::Message;
use pullgate_tests::cri::v1;
use pullgate_tests::grpc::{self, Client};
use pullgate_tests::process::{Output, Process, run};
use pullgate_tests::pullgate::binary;
use pullgate_tests::{Fault, Gate, Image, NextHop, Pullgate, Reply, Rule, World, http, policy, wait};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use tonic::Code;

const PULL: &str = "runtime.v1.ImageService/PullImage";
const STATUS: &str = "runtime.v1.ImageService/ImageStatus";
const LIST: &str = "runtime.v1.ImageService/ListImages";
/// A method that no CRI has yet.
const FUTURE: &str = "runtime.v1.ImageService/FutureImages";

/// A world, a next hop of the tests' own, and pullgate before it.
struct Chained {
    pullgate: Pullgate,
    next_hop: NextHop,
    world: World,
}

impl Chained {
    /// Everything in the world's registry is allowed.
    async fn start() -> Result<Self> {
        let world = World::start().await?;
        let rules = allow(&world);
        Self::with(world, &rules).await
    }

    async fn with(world: World, rules: &str) -> Result<Self> {
        let next_hop = NextHop::new(&world.path().join("n"), &world.containerd.socket());
        next_hop.start()?;
        let pullgate = Pullgate::start(&world, &(through(&world, &next_hop) + rules)).await?;
        next_hop.forget();
        Ok(Self { pullgate, next_hop, world })
    }

    async fn call(&self, method: &str, metadata: &[(&str, &str)], message: &[u8]) -> Result<grpc::Answer> {
        grpc::call(&self.pullgate.socket(), method, metadata, message).await
    }

    /// The daemon is as well as before.
    async fn is_well(&self) -> Result<()> {
        let answer = self.call(LIST, &[], &[]).await?;
        v1::ListImagesResponse::decode(answer.message()?.clone())?;
        assert!(self.pullgate.http("/readyz").await?.status.is_success());
        Ok(())
    }
}

/// Images by the next hop, everything else by containerd.
fn through(world: &World, next_hop: &NextHop) -> String {
    let (socket, certs) = (world.containerd.socket(), world.containerd.certs());
    let (socket, certs, images) = (socket.display(), certs.display(), next_hop.socket().display());
    format!("containerd: {{address: {socket}, imageEndpoint: {images}, registryConfigPath: {certs}}}\n")
}

fn allow(world: &World) -> String {
    policy::rules(&[format!("{{imageGlob: \"{}/**\", strategy: allow}}", world.registry.host())])
}

/// A `PullImageRequest` or `ImageStatusRequest` of a later CRI, which has fields of its own in front
/// of and after those that there are, in the message and in its `ImageSpec`.
fn from_the_future(image: &str) -> Vec<u8> {
    use prost::encoding::{bytes, string, uint64};
    let mut spec = Vec::new();
    string::encode(1, &image.to_owned(), &mut spec);
    bytes::encode(18, &b"as the user wrote it".to_vec(), &mut spec);
    bytes::encode(4321, &b"a field of ImageSpec".to_vec(), &mut spec);
    uint64::encode(4322, &u64::MAX, &mut spec);
    let mut message = Vec::new();
    uint64::encode(1234, &7, &mut message);
    bytes::encode(1, &spec, &mut message);
    bytes::encode(536_870_911, &b"a field of the request".to_vec(), &mut message);
    message
}

/// A field of an answer that nobody knows.
fn unknown_field() -> Vec<u8> {
    let mut field = Vec::new();
    prost::encoding::bytes::encode(999, &b"news of the next hop".to_vec(), &mut field);
    field
}

/// Trailers of a call that failed, with `google.rpc.Status` details.
fn failed(code: &'static str, message: &'static str) -> HeaderMap {
    [
        ("grpc-status", code),
        ("grpc-message", message),
        ("grpc-status-details-bin", DETAILS),
        ("x-trail", "kept"),
    ]
    .into_iter()
    .map(|(name, value)| {
        (hyper::header::HeaderName::from_static(name), hyper::header::HeaderValue::from_static(value))
    })
    .collect()
}

/// base64 without padding, as gRPC sends it: code 9, "not now", no details.
const DETAILS: &str = "CAkSB25vdCBub3c";

fn succeeded() -> HeaderMap {
    HeaderMap::from_iter([(
        hyper::header::HeaderName::from_static("grpc-status"),
        hyper::header::HeaderValue::from_static("0"),
    )])
}

fn is_failure_of_next_hop(answer: &grpc::Answer) {
    let status = answer.status();
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "not now"));
    assert_eq!(status.details(), b"\x08\x09\x12\x07not now", "google.rpc.Status");
    let kept = [&answer.trailers, &answer.headers].iter().any(|map| map.contains_key("x-trail"));
    assert!(kept, "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pull_and_status_keep_every_byte_but_the_reference() -> Result<()> {
    let world = World::start().await?;
    let cosign = world.cosign().await?;
    let key = cosign.generate_key("ci").await?;
    let image = Image::new("app").push(&world.registry).await?;
    cosign.sign(&key.key(), &image.by_digest()).await?;
    let rules = policy::signed(&world.registry, &key.uri());
    let chained = Chained::with(world, &rules).await?;
    chained.next_hop.reply(PULL, Reply::Append(unknown_field()));
    chained.next_hop.reply(STATUS, Reply::Append(unknown_field()));
    let asked = from_the_future(&image.by_tag());
    let metadata = [("x-tenant", "blue"), ("x-trace-bin", "AAEC/w"), ("grpc-timeout", "90S")];

    let pulled = chained.call(PULL, &metadata, &asked).await?;
    let arrived = chained.next_hop.called(PULL).await?;
    assert_eq!(arrived.message()?, from_the_future(&image.by_digest()), "only the reference is another");
    for (name, value) in metadata {
        assert_eq!(arrived.header(name), value);
    }
    let id = v1::PullImageResponse::decode(pulled.message()?.clone())?.image_ref;
    assert_eq!(id, image.config_digest);
    assert!(pulled.message()?.ends_with(&unknown_field()), "{pulled:?}");

    chained.next_hop.forget();
    let present = chained.call(STATUS, &metadata, &asked).await?;
    let arrived = chained.next_hop.called(STATUS).await?;
    assert_eq!(arrived.message()?, asked);
    for (name, value) in metadata {
        assert_eq!(arrived.header(name), value);
    }
    let found = v1::ImageStatusResponse::decode(present.message()?.clone())?.image.context("absent")?;
    assert_eq!(found.id, id);
    assert!(present.message()?.ends_with(&unknown_field()), "{present:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_method_nobody_knows_passes_with_metadata_and_trailers() -> Result<()> {
    let chained = Chained::start().await?;
    let headers = HeaderMap::from_iter([(
        hyper::header::HeaderName::from_static("x-head"),
        hyper::header::HeaderValue::from_static("first"),
    )]);
    let mut trailers = succeeded();
    trailers.insert("x-trail", hyper::header::HeaderValue::from_static("last"));
    chained
        .next_hop
        .reply(FUTURE, Reply::Say(headers, vec![Bytes::from_static(b"\xff\xfe answer")], trailers));
    let metadata = [("x-tenant", "blue"), ("x-trace-bin", "AAEC/w"), ("grpc-timeout", "1500m")];
    let answer = chained.call(FUTURE, &metadata, b"\xff no protobuf at all").await?;
    assert_eq!(answer.message()?, b"\xff\xfe answer".as_slice());
    assert_eq!(
        (&answer.headers["x-head"], &answer.trailers["x-trail"]),
        (&"first".parse()?, &"last".parse()?)
    );
    let arrived = chained.next_hop.called(FUTURE).await?;
    assert_eq!(arrived.message()?, b"\xff no protobuf at all".as_slice());
    for (name, value) in metadata {
        assert_eq!(arrived.header(name), value);
    }
    Ok(())
}

/// Three ways in which a server says no: after a message, with trailers alone, with headers alone.
#[tokio::test(flavor = "multi_thread")]
async fn errors_of_the_next_hop_come_through_with_their_details() -> Result<()> {
    let chained = Chained::start().await?;
    let image = Image::new("app").push(&chained.world.registry).await?;
    let none = HeaderMap::new;
    let partial = v1::ImageStatusResponse::default().encode_to_vec();
    for method in [FUTURE, PULL, STATUS] {
        let ways = [
            Reply::Say(none(), vec![partial.clone().into()], failed("9", "not now")),
            Reply::Say(none(), vec![], failed("9", "not now")),
            Reply::Say(failed("9", "not now"), vec![], none()),
        ];
        for (number, way) in ways.into_iter().enumerate() {
            chained.next_hop.reply(method, way);
            let answer = chained.call(method, &[], &from_the_future(&image.by_tag())).await;
            is_failure_of_next_hop(&answer.with_context(|| format!("{method}, way {number}"))?);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_stream_arrives_frame_by_frame() -> Result<()> {
    use http_body_util::BodyExt;
    let chained = Chained::start().await?;
    let (frames, live) = Reply::live();
    chained.next_hop.reply(FUTURE, live);
    let client = Client::connect(&chained.pullgate.socket()).await?;
    let answer = client.send(FUTURE, &[], grpc::frame(b"go"));
    let mut answer =
        tokio::time::timeout(wait::LONG, answer).await.context("its headers are held back")??;
    // Each is sent only after the one before has arrived.
    for text in ["one", "two", "three"] {
        frames.send(Frame::data(grpc::frame(text.as_bytes())))?;
        let frame = tokio::time::timeout(wait::LONG, answer.frame()).await.context("it is held back")?;
        assert_eq!(frame.context("the end")??.into_data().ok(), Some(grpc::frame(text.as_bytes())));
    }
    frames.send(Frame::trailers(failed("9", "not now")))?;
    let last = answer.frame().await.context("no trailers")??.into_trailers();
    assert_eq!(last.ok().context("not trailers")?["grpc-status"], "9");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_cancels_its_call_at_the_next_hop() -> Result<()> {
    let chained = Chained::start().await?;
    let image = Image::new("app").push(&chained.world.registry).await?;
    let silent = [FUTURE, PULL, STATUS];
    for method in silent {
        chained.next_hop.reply(method, Reply::Silence);
    }
    let message = from_the_future(&image.by_tag());
    // One call of several is cancelled (RST_STREAM): the connection and the others stay.
    let client = Client::connect(&chained.pullgate.socket()).await?;
    for method in silent {
        let arrived = tokio::select! {
            answer = client.call(method, &[], &message) => anyhow::bail!("answered: {answer:?}"),
            arrived = chained.next_hop.called(method) => arrived?,
        };
        arrived.hung_up().await.context(method)?;
        assert!(!client.is_closed());
    }
    // The whole connection breaks off, in the middle of a stream.
    let (frames, live) = Reply::live();
    chained.next_hop.reply(LIST, live);
    frames.send(Frame::data(grpc::frame(b"begin")))?;
    let streaming = client.send(LIST, &[], grpc::frame(&[])).await?;
    let arrived = chained.next_hop.called(LIST).await?;
    client.hang_up()?;
    arrived.hung_up().await?;
    drop(streaming);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_and_requests_of_15_mib_pass_and_more_than_16_is_refused() -> Result<()> {
    const MIB: usize = 1 << 20;
    let chained = Chained::start().await?;
    let image = Image::new("app").push(&chained.world.registry).await?;
    let mut large = unknown_field();
    prost::encoding::bytes::encode(998, &vec![0x5a; 15 * MIB], &mut large);
    let say = |message: &[u8]| Reply::Say(HeaderMap::new(), vec![message.to_vec().into()], succeeded());
    for method in [LIST, PULL, STATUS] {
        chained.next_hop.reply(method, say(&large));
        let request = [from_the_future(&image.by_tag()), large.clone()].concat();
        let answer = chained.call(method, &[], &request).await?;
        assert!(*answer.message()? == large, "{method}: another answer of {}", answer.message()?.len());
        assert!(chained.next_hop.called(method).await?.message()?.ends_with(&large), "{method}");
    }
    chained.next_hop.forget();
    prost::encoding::bytes::encode(997, &vec![0x5a; MIB], &mut large);
    for method in [PULL, STATUS] {
        let request = [from_the_future(&image.by_tag()), large.clone()].concat();
        let status = chained.call(method, &[], &request).await?.status();
        assert_eq!(status.code(), Code::ResourceExhausted, "{method}: {status}");
        assert_eq!(chained.next_hop.calls(method).len(), 0);
    }
    chained.next_hop.reply(LIST, say(&v1::ListImagesResponse::default().encode_to_vec()));
    chained.is_well().await
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_messages_get_a_status_and_the_daemon_lives() -> Result<()> {
    let chained = Chained::start().await?;
    let socket = chained.pullgate.socket();
    let good = grpc::frame(&from_the_future("app:1"));
    let mut compressed = good.to_vec();
    compressed[0] = 1;
    let with_length = |length: [u8; 4]| [&[0], length.as_slice(), &good[5..]].concat();
    let broken: [(&str, Vec<u8>, Code); 9] = [
        ("compressed", compressed, Code::Unimplemented),
        ("nothing", vec![], Code::Internal),
        ("half a frame header", good[..3].to_vec(), Code::Internal),
        ("half a message", good[..good.len() / 2].to_vec(), Code::Internal),
        ("too short a length", with_length([0, 0, 0, 1]), Code::Internal),
        ("too long a length", with_length([0xff; 4]), Code::Internal),
        ("two messages", [good.clone(), good.clone()].concat(), Code::Internal),
        ("an endless varint", grpc::frame(&[0xff; 64]).to_vec(), Code::Internal),
        ("a field beyond the end", grpc::frame(&[0x0a, 0x7f, 0x0a]).to_vec(), Code::Internal),
    ];
    for method in [PULL, STATUS] {
        for (what, body, code) in &broken {
            let client = Client::connect(&socket).await?;
            let answer = grpc::Answer::of(client.send(method, &[], body.clone()).await?).await?;
            assert_eq!(answer.status().code(), *code, "{method} with {what}: {}", answer.status());
        }
        assert_eq!(chained.next_hop.calls(method).len(), 0, "nothing of it went on");
    }
    // Not even HTTP/2: the connection ends, and nothing else does.
    for noise in
        [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &[0; 4096], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff"]
    {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = UnixStream::connect(&socket).await?;
        // The daemon may hang up before it has heard all.
        let _ = stream.write_all(noise).await;
        let _ = stream.shutdown().await;
        let rest = tokio::time::timeout(wait::LONG, stream.read_to_end(&mut Vec::new())).await;
        let _ = rest.context("the connection stays open")?;
    }
    chained.is_well().await
}

fn is_dialing_error(status: &tonic::Status, socket: &Path, why: &str) {
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let socket = socket.display();
    assert_eq!(
        status.message(),
        format!(
            "connection error: desc = \"transport: Error while dialing: dial unix {socket}: connect: {why}\""
        )
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_hop_may_be_away_at_the_start_and_die_and_come_back() -> Result<()> {
    let world = World::start().await?;
    let next_hop = NextHop::new(&world.path().join("n"), &world.containerd.socket());
    let image = Image::new("app").push(&world.registry).await?;
    let config = through(&world, &next_hop) + &allow(&world);
    let pullgate = Pullgate::prepare(&world, &config, &[])?;
    wait::until("it to live", wait::LONG, async || Ok(pullgate.http("/healthz").await.ok())).await?;
    wait::until_true("its socket", || pullgate.socket().exists()).await?;
    let cri = pullgate.cri();

    let away = "no such file or directory";
    for _ in 0..3 {
        is_dialing_error(&cri.list_images().await.unwrap_err(), next_hop.socket(), away);
        is_dialing_error(&cri.pull(&image.by_tag()).await.unwrap_err(), next_hop.socket(), away);
        is_dialing_error(&cri.image_status(&image.by_tag()).await.unwrap_err(), next_hop.socket(), away);
    }
    let ready = pullgate.http("/readyz").await?;
    assert_eq!(ready.status.as_u16(), 503);
    assert!(ready.text().contains(away), "{}", ready.text());
    assert!(pullgate.http("/healthz").await?.status.is_success(), "a restart would not mend it");

    next_hop.start()?;
    cri.pull(&image.by_tag()).await?;
    assert!(cri.image_status(&image.by_tag()).await?.is_some());
    pullgate.ready().await?;

    // It dies during a call.
    next_hop.reply(LIST, Reply::Silence);
    let held = tokio::spawn({
        let cri = cri.clone();
        async move { cri.list_images().await }
    });
    next_hop.called(LIST).await?;
    next_hop.die(true);
    assert_eq!(held.await?.unwrap_err().code(), Code::Unavailable);
    wait::until("dialing to fail", wait::LONG, async || {
        Ok(cri.image_fs_info().await.err().filter(|status| status.message().contains("dialing")))
    })
    .await?;
    let refused = cri.image_status(&image.by_tag()).await.unwrap_err();
    is_dialing_error(&refused, next_hop.socket(), "connection refused");

    next_hop.die(false);
    next_hop.reply(LIST, Reply::Append(vec![]));
    next_hop.start()?;
    assert!(!cri.list_images().await?.is_empty());
    cri.pull(&image.by_tag()).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_restarts_under_it() -> Result<()> {
    let world = World::start().await?;
    let pullgate = Pullgate::start(&world, &allow(&world)).await?;
    let cri = pullgate.cri();
    let before = Image::new("before").push(&world.registry).await?;
    cri.pull(&before.by_tag()).await?;
    world.containerd.kill9();
    is_dialing_error(&cri.list_images().await.unwrap_err(), &world.containerd.socket(), "connection refused");
    let ready = pullgate.http("/readyz").await?;
    assert_eq!(ready.status.as_u16(), 503);
    assert!(ready.text().contains("connection refused"), "{}", ready.text());

    world.containerd.restart().await?;
    assert!(cri.image_status(&before.by_tag()).await?.is_some());
    let after = Image::new("after").push(&world.registry).await?;
    cri.pull(&after.by_tag()).await?;
    assert!(cri.image_status(&after.by_tag()).await?.is_some());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn other_services_are_unknown_here_or_they_were_ways_around_the_gate() -> Result<()> {
    let chained = Chained::start().await?;
    let image = Image::new("app").push(&chained.world.registry).await?;
    for service in [
        "runtime.v1.RuntimeService",
        "runtime.v1alpha2.ImageService",
        "runtime.v1alpha2.RuntimeService",
        "containerd.services.images.v1.Images",
        "containerd.services.content.v1.Content",
        "containerd.services.transfer.v1.Transfer",
        "grpc.health.v1.Health",
    ] {
        for method in ["PullImage", "Version", "Create", "Transfer"] {
            let method = format!("{service}/{method}");
            let status = chained.call(&method, &[], &from_the_future(&image.by_tag())).await?.status();
            assert_eq!(
                (status.code(), status.message()),
                (Code::Unimplemented, &*format!("unknown service {service}"))
            );
            assert_eq!(chained.next_hop.calls(&method).len(), 0);
        }
    }
    // Spellings that a lenient server might take for the gated methods.
    for method in [
        "/runtime.v1.ImageService/PullImage",
        "runtime.v1.imageservice/PullImage",
        "Runtime.V1.ImageService/PullImage",
        "x/runtime.v1.ImageService/PullImage",
        "runtime.v1.ImageService%2FPullImage",
    ] {
        let status = chained.call(method, &[], &from_the_future(&image.by_tag())).await?.status();
        assert_eq!(status.code(), Code::Unimplemented, "{method}: {status}");
    }
    assert!(chained.world.cri()?.list_images().await?.iter().all(|i| i.id != image.config_digest));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_runtime_service_passes_where_the_configuration_says_so() -> Result<()> {
    let world = World::start().await?;
    let rules = "runtimeService: passThrough\n".to_owned() + &allow(&world);
    let chained = Chained::with(world, &rules).await?;
    let asked = v1::VersionRequest { version: "v1".into() }.encode_to_vec();
    let answer = chained.call("runtime.v1.RuntimeService/Version", &[], &asked).await?;
    assert_eq!(v1::VersionResponse::decode(answer.message()?.clone())?.runtime_name, "containerd");
    let status = chained.call("runtime.v1alpha2.RuntimeService/Version", &[], &asked).await?.status();
    assert_eq!(status.code(), Code::Unimplemented, "{status}");
    Ok(())
}

/// What a process of another user reads from a socket after it has said this.
async fn as_user(uid: u32, socket: &Path, say: &str) -> Result<Output> {
    const SPEAK: &str = r#"
        use IO::Socket::UNIX;
        $SIG{PIPE} = 'IGNORE';
        my $socket = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die "connect: $!\n";
        $socket->syswrite(eval qq("$ARGV[1]"));
        $socket->sysread(my $heard, 65536);
        print length($heard // '');"#;
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={uid}")).arg(format!("--regid={uid}")).arg("--clear-groups");
    command.args(["/usr/bin/perl", "-e", SPEAK]).arg(socket).arg(say).current_dir("/");
    run(command).await
}

#[tokio::test(flavor = "multi_thread")]
async fn only_root_speaks_to_the_sockets_even_where_the_mode_was_loosened() -> Result<()> {
    const NOBODY: u32 = 65534;
    let world = World::start().await?;
    let pullgate = Pullgate::start(&world, &allow(&world)).await?;
    let folder = pullgate.socket().parent().context("no folder")?.to_owned();
    for path in [world.path(), &folder] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    }
    let request = r"GET /status HTTP/1.1\r\nhost: pullgate\r\n\r\n";
    let preface = r"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";
    for (socket, say) in [("s", preface), ("a", request)] {
        let socket = folder.join(socket);
        assert_eq!(std::fs::metadata(&socket)?.mode() & 0o7777, 0o600, "{socket:?}");
        let closed = as_user(NOBODY, &socket, say).await?;
        assert!(closed.stderr.contains("connect: Permission denied"), "{closed:?}");

        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666))?;
        let before = pullgate.log().matches("another user was refused").count();
        let refused = as_user(NOBODY, &socket, say).await?;
        assert_eq!((refused.stdout.as_str(), refused.stderr.as_str()), ("0", ""), "it was spoken to");
        wait::until_true("the log line", || {
            pullgate.log().matches("another user was refused").count() > before
        })
        .await?;
        assert!(pullgate.log().contains(&format!("\"UID\":{NOBODY}")), "{}", pullgate.log());

        let root = as_user(0, &socket, say).await?.ok()?;
        assert_ne!(root.stdout, "0", "root is answered at {socket:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_socket_is_taken_over_and_a_live_one_is_not() -> Result<()> {
    let world = World::start().await?;
    let pullgate = Pullgate::start(&world, &allow(&world)).await?;
    pullgate.kill9();
    assert!(pullgate.socket().exists(), "nobody could tidy up");
    pullgate.start_again().await?;
    pullgate.cri().image_fs_info().await?;

    let second = pullgate.admin(&["run"]).await?;
    assert_eq!(second.status.code(), Some(2), "{second:?}");
    let text = format!("another process listens on {}; stop it first", pullgate.socket().display());
    assert!(second.stderr.contains(&text), "{second:?}");
    pullgate.cri().image_fs_info().await.context("the first goes on")?;
    assert!(pullgate.stop().await?.success());
    assert!(!pullgate.socket().exists(), "it tidies up after itself");
    Ok(())
}

/// Starts pullgate as `systemd-socket-activate` does it: once somebody connects.
fn activated(world: &World, folder: &Path, sockets: &[&Path]) -> Result<Process> {
    let mut command = Command::new("systemd-socket-activate");
    for socket in sockets {
        command.arg("--listen").arg(socket);
    }
    command.arg("--setenv=PULLGATE_LOG=json");
    for (name, value) in world.aws_env() {
        command.arg(format!("--setenv={name}={value}"));
    }
    command.arg(binary()?).args(["run", "--config"]).arg(folder.join("config.yaml"));
    Process::start("pullgate", command, &folder.join("log"))
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_of_systemd_are_served_in_any_order_and_left_open() -> Result<()> {
    let world = World::start().await?;
    for admin_first in [false, true] {
        let folder = world.folder("p")?;
        let (gate, admin) = (folder.join("s"), folder.join("a"));
        let containerd = world.containerd.socket();
        std::fs::write(
            folder.join("config.yaml"),
            format!(
                "listen: {}\nadmin: {}\nstateDir: {}\nmetrics: {{listen: \"off\"}}\ncontainerd: {{address: {}}}\n{}",
                gate.display(),
                admin.display(),
                folder.join("state").display(),
                containerd.display(),
                allow(&world),
            ),
        )?;
        let sockets = if admin_first { [&*admin, &*gate] } else { [&*gate, &*admin] };
        let process = activated(&world, &folder, &sockets)?;
        wait::until_true("the sockets", || gate.exists() && admin.exists()).await?;
        let inodes =
            || Ok::<_, std::io::Error>((std::fs::metadata(&gate)?.ino(), std::fs::metadata(&admin)?.ino()));
        let before = inodes()?;

        // The first call is what starts it, and it is answered.
        let images = grpc::call(&gate, LIST, &[], &[]).await?;
        v1::ListImagesResponse::decode(images.message()?.clone())?;
        let status = http::get_unix(&admin, "/status").await?.json()?;
        assert_eq!(status["rules"], 1, "{status}");
        assert_eq!(inodes()?, before, "systemd's sockets are not replaced");

        assert!(process.stop().await?.success(), "{}", process.log());
        assert_eq!(inodes()?, before, "nor removed");
        assert!(!process.log().contains("does not name"), "{}", process.log());
    }
    Ok(())
}

/// A pull that is held at the registry, so that a stop finds it in flight.
async fn held_pull(world: &World, pullgate: &Pullgate) -> Result<(Gate, HeldPull)> {
    let image = Image::new("slow").push(&world.registry).await?;
    let gate = Gate::new();
    world.registry.proxy.inject(Rule::on("/v2/slow/blobs/*", Fault::Hold(gate.clone())));
    let cri = pullgate.cri().clone();
    let pull = tokio::spawn(async move { cri.pull(&image.by_tag()).await });
    gate.arrived(1).await?;
    Ok((gate, pull))
}

type HeldPull = tokio::task::JoinHandle<Result<String, tonic::Status>>;

async fn a_stop_lets_a_pull_finish(signal: Signal) -> Result<()> {
    let world = World::start().await?;
    let pullgate = Pullgate::start(&world, &allow(&world)).await?;
    let (gate, pull) = held_pull(&world, &pullgate).await?;
    let idle = Client::connect(&pullgate.socket()).await?;
    idle.call(LIST, &[], &[]).await?;

    pullgate.signal(signal)?;
    wait::until("new connections to be refused", wait::LONG, async || {
        Ok(UnixStream::connect(pullgate.socket()).await.is_err().then_some(()))
    })
    .await?;
    wait::until_true("GOAWAY on a connection at rest", || idle.is_closed()).await?;
    assert!(!pull.is_finished(), "the pull goes on");
    gate.open();
    pull.await?.context("the pull")?;
    let ended = pullgate.stop().await?;
    assert_eq!(ended.code(), Some(0), "{}", pullgate.log());
    assert!(!pullgate.log().contains("still in flight"), "{}", pullgate.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_a_pull_in_flight_finish() -> Result<()> {
    a_stop_lets_a_pull_finish(Signal::SIGTERM).await
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_lets_a_pull_in_flight_finish() -> Result<()> {
    a_stop_lets_a_pull_finish(Signal::SIGINT).await
}

/// Below the unit's TimeoutStopSec (40 s), or systemd kills it before it has written its state.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_is_bounded_where_a_pull_never_ends() -> Result<()> {
    let world = World::start().await?;
    let pullgate = Pullgate::start(&world, &allow(&world)).await?;
    let (_gate, pull) = held_pull(&world, &pullgate).await?;
    let begin = Instant::now();
    pullgate.signal(Signal::SIGTERM)?;
    let status = pull.await?.unwrap_err();
    assert_ne!(status.code(), Code::Unimplemented, "{status}");
    let ended = pullgate.stop().await?;
    assert_eq!(ended.code(), Some(0), "{}", pullgate.log());
    assert!(begin.elapsed() < Duration::from_secs(32), "{:?}", begin.elapsed());
    assert!(pullgate.log().contains("still in flight"), "{}", pullgate.log());
    Ok(())
}

/// Who presses Ctrl-C twice does not want to wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_ctrl_c_ends_it_at_once() -> Result<()> {
    let world = World::start().await?;
    let pullgate = Pullgate::start(&world, &allow(&world)).await?;
    let (_gate, pull) = held_pull(&world, &pullgate).await?;
    pullgate.signal(Signal::SIGINT)?;
    wait::until_true("it to drain", || pullgate.log().contains("calls in flight are finished first")).await?;
    let begin = Instant::now();
    pullgate.signal(Signal::SIGINT)?;
    assert!(pull.await?.is_err());
    let ended = pullgate.stop().await?;
    assert_eq!(ended.code(), Some(0), "{}", pullgate.log());
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    assert!(pullgate.log().contains("calls in flight are dropped"), "{}", pullgate.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_metrics_are_served_on_tcp_and_on_a_unix_socket() -> Result<()> {
    let world = World::start().await?;
    let tcp = Pullgate::start(&world, &allow(&world)).await?;
    let socket = world.path().join("m");
    let unix = format!("metrics: {{listen: \"unix://{}\"}}\n", socket.display()) + &allow(&world);
    let unix = Pullgate::prepare(&world, &unix, &[])?;
    wait::until_true("its socket", || socket.exists() && unix.socket().exists()).await?;
    assert_eq!(std::fs::metadata(&socket)?.mode() & 0o7777, 0o600);

    for pullgate in [&tcp, &unix] {
        let get = async |path: &str| match std::ptr::eq(pullgate, &raw const unix) {
            true => http::get_unix(&socket, path).await,
            false => pullgate.http(path).await,
        };
        assert_eq!(get("/healthz").await?.text(), "ok\n");
        assert_eq!(get("/readyz").await?.text(), "ok\n");
        let metrics = get("/metrics").await?;
        assert!(metrics.header("content-type").unwrap_or("").starts_with("text/plain; version=0.0.4"));
        for name in ["pullgate_build_info{", "pullgate_config_last_reload_successful 1"] {
            assert!(metrics.text().contains(name), "no {name} in {}", metrics.text());
        }
        assert_eq!(get("/secrets").await?.status.as_u16(), 404);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn status_tells_people_and_programs_the_same() -> Result<()> {
    let world = World::start().await?;
    let pullgate = Pullgate::start(&world, &allow(&world)).await?;
    let json = pullgate.admin(&["status", "--output", "json"]).await?.ok()?;
    let json: serde_json::Value = serde_json::from_str(&json.stdout)?;
    assert_eq!(json["rules"], 1);
    assert_eq!(json["nextHop"], *world.containerd.socket().display().to_string());
    assert_eq!(
        (&json["configError"], &json["nextHopError"]),
        (&serde_json::Value::Null, &serde_json::Value::Null)
    );
    let text = pullgate.admin(&["status"]).await?.ok()?.stdout;
    for (name, value) in json.as_object().context("no object")? {
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        let line = line.with_context(|| format!("no {name} in {text}"))?;
        if name != "uptimeSeconds" {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            assert!(line.ends_with(&value), "{line} is not {value}");
        }
    }

    world.containerd.kill9();
    let text = pullgate.admin(&["status"]).await?.ok()?.stdout;
    assert!(text.contains("connection refused"), "{text}");
    pullgate.stop().await?;
    let away = pullgate.admin(&["status"]).await?;
    assert_eq!(away.status.code(), Some(3), "{away:?}");
    assert!(away.stderr.contains("is the daemon running? systemctl status pullgate"), "{away:?}");
    Ok(())
}
