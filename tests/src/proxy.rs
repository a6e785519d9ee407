//! A reverse proxy on loopback that counts requests and injects faults. It stands in front of every
//! registry and AWS stand-in of a world.

use crate::http;
use crate::oci::{self, Oci};
use crate::referrers;
use crate::wait;
use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_LENGTH, HeaderName, HeaderValue, LOCATION, TRANSFER_ENCODING};
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Body = BoxBody<Bytes, BoxError>;

/// What goes wrong.
#[derive(Clone)]
pub enum Fault {
    /// Answered by the proxy itself; upstream never sees the request.
    Status {
        /// The status code.
        code: u16,
        /// Headers to answer with.
        headers: Vec<(String, String)>,
        /// The body.
        body: Vec<u8>,
    },
    /// Upstream's answer with another body (and the right length for it).
    Body(Vec<u8>),
    /// Upstream's answer with the body changed by a function.
    Edit(Arc<dyn Fn(Vec<u8>) -> Vec<u8> + Send + Sync>),
    /// Upstream's answer with one header set, or removed if the value is empty.
    Header(String, String),
    /// Upstream's answer, announced with another Content-Length.
    ContentLength(u64),
    /// Upstream's status and headers, then a body that never ends.
    Endless,
    /// Upstream's status and headers and a part of its body, then silence.
    Stall(usize),
    /// No answer at all, the connection stays open.
    Hang,
    /// The connection is reset (RST).
    Reset,
    /// Upstream's answer, but later.
    Delay(Duration),
    /// Held until the gate is opened, then passed on.
    Hold(Gate),
}

impl Fault {
    /// A status with an empty body.
    pub fn status(code: u16) -> Self {
        Self::Status { code, headers: Vec::new(), body: Vec::new() }
    }

    /// 429 with Retry-After in seconds.
    pub fn throttle(retry_after: u64) -> Self {
        Self::status(429).header("retry-after", &retry_after.to_string())
    }

    /// 307 to another address.
    pub fn redirect(location: &str) -> Self {
        Self::status(307).header(LOCATION.as_str(), location)
    }

    /// Status 200 with this body: an answer made up from nothing.
    pub fn answer(media_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self::Status {
            code: 200,
            headers: vec![("content-type".into(), media_type.into())],
            body: body.into(),
        }
    }

    /// The error body of the AWS JSON protocols.
    pub fn aws(code: u16, kind: &str) -> Self {
        Self::Status {
            code,
            headers: vec![("content-type".into(), "application/x-amz-json-1.1".into())],
            body: format!(r#"{{"__type":"{kind}","message":"injected"}}"#).into_bytes(),
        }
    }

    /// Adds a header to a [`Fault::Status`].
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        if let Self::Status { headers, .. } = &mut self {
            headers.push((name.to_owned(), value.to_owned()));
        }
        self
    }
}

/// Holds requests until a test has seen what it wanted to see.
#[derive(Clone)]
pub struct Gate {
    open: Arc<watch::Sender<bool>>,
    arrived: Arc<watch::Sender<usize>>,
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl Gate {
    /// A closed gate.
    pub fn new() -> Self {
        Self { open: Arc::new(watch::channel(false).0), arrived: Arc::new(watch::channel(0).0) }
    }

    /// Waits until so many requests stand before the gate, or have passed it.
    pub async fn arrived(&self, count: usize) -> Result<()> {
        let mut arrived = self.arrived.subscribe();
        let enough = arrived.wait_for(|now| *now >= count);
        tokio::time::timeout(wait::LONG, enough)
            .await
            .with_context(|| format!("no {count} requests came to the gate"))??;
        Ok(())
    }

    /// Lets all pass, now and later.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    async fn pass(&self) {
        self.arrived.send_modify(|count| *count += 1);
        let _ = self.open.subscribe().wait_for(|open| *open).await;
    }
}

/// Which requests a fault is for. Path patterns are anchored; `*` matches anything.
#[derive(Clone)]
pub struct Rule {
    path: String,
    method: Option<String>,
    headers: Vec<(String, String)>,
    anonymous: bool,
    skip: usize,
    times: usize,
    fault: Fault,
}

impl Rule {
    /// A fault for all requests whose path matches, as `/v2/*/manifests/sha256-*.sig`. A pattern with
    /// a `?` is compared with path and query.
    pub fn on(path: &str, fault: Fault) -> Self {
        Self {
            path: path.to_owned(),
            method: None,
            headers: Vec::new(),
            anonymous: false,
            skip: 0,
            times: usize::MAX,
            fault,
        }
    }

    /// Only this method.
    #[must_use]
    pub fn method(mut self, method: &str) -> Self {
        self.method = Some(method.to_owned());
        self
    }

    /// Only with a header that contains this text (`user-agent`, `x-amz-target`).
    #[must_use]
    pub fn header(mut self, name: &str, contains: &str) -> Self {
        self.headers.push((name.to_owned(), contains.to_owned()));
        self
    }

    /// Only requests without Authorization.
    #[must_use]
    pub fn anonymous(mut self) -> Self {
        self.anonymous = true;
        self
    }

    /// Not the first `count` that match: "answers differently the second time".
    #[must_use]
    pub fn skip(mut self, count: usize) -> Self {
        self.skip = count;
        self
    }

    /// Only so many times, then no more.
    #[must_use]
    pub fn times(mut self, count: usize) -> Self {
        self.times = count;
        self
    }

    fn matches(&self, seen: &Seen) -> bool {
        let whole = match (&seen.query, self.path.contains('?')) {
            (Some(query), true) => format!("{}?{query}", seen.path),
            _ => seen.path.clone(),
        };
        wildcard(&self.path, &whole)
            && self.method.as_ref().is_none_or(|method| *method == seen.method)
            && self.headers.iter().all(|(name, part)| seen.header(name).contains(part.as_str()))
            && !(self.anonymous && seen.authorized())
    }
}

/// One request that came through.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The method.
    pub method: String,
    /// The path, without the query.
    pub path: String,
    /// The query, if any.
    pub query: Option<String>,
    /// All headers.
    pub headers: HeaderMap,
}

impl Seen {
    /// A header's value, or the empty string.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
    }

    /// Whether it carried credentials.
    pub fn authorized(&self) -> bool {
        self.headers.contains_key("authorization")
    }
}

#[derive(Default)]
struct State {
    /// Who answers the referrers API, and with how many entries a page.
    referrers: Option<(Oci, usize)>,
    rules: Vec<Rule>,
    seen: Vec<Seen>,
    running: usize,
    peak: usize,
}

impl State {
    /// The fault for a request; rules are tried in the order in which they were injected.
    fn fault(&mut self, seen: &Seen) -> Option<Fault> {
        for rule in &mut self.rules {
            if rule.times == 0 || !rule.matches(seen) {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
                continue;
            }
            rule.times -= 1;
            return Some(rule.fault.clone());
        }
        None
    }
}

type Shared = Arc<Mutex<State>>;

fn lock(state: &Shared) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The proxy: lives until dropped.
pub struct Proxy {
    address: SocketAddr,
    upstream: SocketAddr,
    state: Shared,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Plain HTTP in front of `upstream`.
    pub async fn start(upstream: SocketAddr) -> Result<Self> {
        Self::serve(upstream, None).await
    }

    /// TLS with a certificate for 127.0.0.1 and localhost; upstream is still plain HTTP.
    pub async fn start_tls(upstream: SocketAddr, cert: &Path, key: &Path) -> Result<Self> {
        use rustls::pki_types::pem::PemObject;
        use rustls::pki_types::{CertificateDer, PrivateKeyDer};
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_file(cert)?],
                PrivateKeyDer::from_pem_file(key)?,
            )?;
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        Self::serve(upstream, Some(acceptor)).await
    }

    async fn serve(upstream: SocketAddr, tls: Option<tokio_rustls::TlsAcceptor>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let state = Shared::default();
        let task = tokio::spawn(accept(listener, upstream, tls, Arc::clone(&state)));
        Ok(Self { address, upstream, state, task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What stands behind it: requests sent there are not counted and meet no fault.
    pub fn upstream(&self) -> SocketAddr {
        self.upstream
    }

    /// From now on this goes wrong.
    pub fn inject(&self, rule: Rule) {
        lock(&self.state).rules.push(rule);
    }

    /// No faults any more.
    pub fn heal(&self) {
        lock(&self.state).rules.clear();
    }

    /// Answers the referrers API of OCI 1.1 from the fallback tags upstream, so many a page.
    pub fn serve_referrers(&self, oci: Oci, page: usize) {
        lock(&self.state).referrers = Some((oci, page));
    }

    /// All requests since the start, or since [`Proxy::forget`].
    pub fn requests(&self) -> Vec<Seen> {
        lock(&self.state).seen.clone()
    }

    /// How many requests came with this method (`*` for any) and a matching path.
    pub fn count(&self, method: &str, path: &str) -> usize {
        let rule = Rule::on(path, Fault::Hang);
        let state = lock(&self.state);
        let same = |seen: &&Seen| (method == "*" || seen.method == method) && rule.matches(seen);
        state.seen.iter().filter(same).count()
    }

    /// How many requests had a header that contains this text (`x-amz-target`, `GetPublicKey`).
    pub fn count_header(&self, name: &str, contains: &str) -> usize {
        let state = lock(&self.state);
        let same = |seen: &&Seen| seen.header(name).contains(contains);
        state.seen.iter().filter(same).count()
    }

    /// How many requests are under way now; one whose caller went away is not.
    pub fn running(&self) -> usize {
        lock(&self.state).running
    }

    /// The most requests that were under way at once.
    pub fn peak(&self) -> usize {
        lock(&self.state).peak
    }

    /// Begins to count anew.
    pub fn forget(&self) {
        let mut state = lock(&self.state);
        state.seen.clear();
        state.peak = state.running;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(
    listener: TcpListener,
    upstream: SocketAddr,
    tls: Option<tokio_rustls::TlsAcceptor>,
    state: Shared,
) {
    // Connections end with the proxy, as they would with a registry that dies.
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((socket, _)) = listener.accept().await {
        let (tls, state) = (tls.clone(), Arc::clone(&state));
        connections.spawn(async move {
            let _ = connection(socket, upstream, tls, state).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(
    socket: TcpStream,
    upstream: SocketAddr,
    tls: Option<tokio_rustls::TlsAcceptor>,
    state: Shared,
) -> Result<()> {
    socket.set_nodelay(true)?;
    let socket = socket.into_std()?;
    // A second handle on the socket: the only way to ask for a reset once hyper owns the first.
    let handle = Arc::new(socket.try_clone()?);
    let socket = TcpStream::from_std(socket)?;
    let scheme = if tls.is_some() { "https" } else { "http" };
    let service = hyper::service::service_fn(move |request| {
        let (state, handle) = (Arc::clone(&state), Arc::clone(&handle));
        answer(request, upstream, scheme, state, handle)
    });
    let server = hyper::server::conn::http1::Builder::new();
    match tls {
        Some(tls) => {
            let socket = tls.accept(socket).await?;
            server.serve_connection(TokioIo::new(socket), service).await?;
        }
        None => server.serve_connection(TokioIo::new(socket), service).await?,
    }
    Ok(())
}

/// Counts a request as under way while it lives.
struct Running(Shared);

impl Running {
    fn begin(shared: &Shared) -> Self {
        let mut state = lock(shared);
        state.running += 1;
        state.peak = state.peak.max(state.running);
        Self(Arc::clone(shared))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        lock(&self.0).running -= 1;
    }
}

async fn answer(
    request: Request<Incoming>,
    upstream: SocketAddr,
    scheme: &'static str,
    state: Shared,
    handle: Arc<std::net::TcpStream>,
) -> Result<Response<Body>, BoxError> {
    let seen = Seen {
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
        query: request.uri().query().map(str::to_owned),
        headers: request.headers().clone(),
    };
    let _running = Running::begin(&state);
    let (fault, referrers) = {
        let mut state = lock(&state);
        let fault = state.fault(&seen);
        state.seen.push(seen);
        (fault, state.referrers.clone())
    };
    let upstream = Upstream { address: upstream, scheme, referrers };
    match fault {
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Reset) => {
            let _ = socket2::SockRef::from(&*handle).set_linger(Some(Duration::ZERO));
            Err("injected reset".into())
        }
        Some(Fault::Status { code, headers, body }) => {
            let mut response = Response::builder().status(code);
            for (name, value) in headers {
                response = response.header(name, value);
            }
            Ok(response.body(whole(body))?)
        }
        Some(Fault::Delay(time)) => {
            tokio::time::sleep(time).await;
            upstream.forward(request).await
        }
        Some(Fault::Hold(gate)) => {
            gate.pass().await;
            upstream.forward(request).await
        }
        Some(fault) => spoil(upstream.forward(request).await?, fault).await,
        None => upstream.forward(request).await,
    }
}

/// What stands behind the proxy.
struct Upstream {
    address: SocketAddr,
    scheme: &'static str,
    referrers: Option<(Oci, usize)>,
}

impl Upstream {
    /// Passes a request on, or answers the referrers API in upstream's place.
    async fn forward(&self, request: Request<Incoming>) -> Result<Response<Body>, BoxError> {
        let Some((oci, size)) = &self.referrers else {
            return self.send(request.map(|body| body.boxed())).await;
        };
        let (method, uri) = (request.method().clone(), request.uri().clone());
        if let Some((repository, digest)) = referrers::asked(uri.path()) {
            let page = referrers::page(oci, repository, digest, uri.query(), *size).await?;
            let mut response = Response::builder().header("content-type", oci::INDEX);
            if let Some(next) = page.next {
                response = response.header("link", format!("<{next}>; rel=\"next\""));
            }
            return Ok(response.body(whole(page.body))?);
        }
        match referrers::pushed_to(uri.path()) {
            Some(repository) if method == hyper::Method::PUT => {
                let (head, body) = request.into_parts();
                let manifest = body.collect().await?.to_bytes();
                let request = Request::from_parts(head, Full::new(manifest.clone()));
                let mut response = self.send(request).await?;
                if response.status().is_success()
                    && let Some(subject) = referrers::stored(oci, repository, &manifest).await?
                {
                    let subject = HeaderValue::from_str(&subject)?;
                    response.headers_mut().insert("oci-subject", subject);
                }
                Ok(response)
            }
            _ => self.send(request.map(|body| body.boxed())).await,
        }
    }

    /// Passes a request on. The Host header stays, so that a registry's Location headers lead back
    /// here.
    async fn send<B>(&self, mut request: Request<B>) -> Result<Response<Body>, BoxError>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        request.headers_mut().insert("x-forwarded-proto", HeaderValue::from_static(self.scheme));
        match http::stream(self.address, request).await {
            Ok(response) => Ok(response.map(|body| body.map_err(Into::into).boxed())),
            Err(error) => Ok(Response::builder()
                .status(StatusCode::BAD_GATEWAY)
                .body(whole(format!("the proxy's upstream: {error:#}").into_bytes()))?),
        }
    }
}

/// Changes an answer of upstream.
async fn spoil(response: Response<Body>, fault: Fault) -> Result<Response<Body>, BoxError> {
    let (mut head, body) = response.into_parts();
    let bytes = body.collect().await?.to_bytes();
    let body = match fault {
        Fault::Body(other) => {
            head.headers.remove(TRANSFER_ENCODING);
            head.headers.insert(CONTENT_LENGTH, other.len().into());
            whole(other)
        }
        Fault::Edit(edit) => {
            let other = edit(bytes.to_vec());
            head.headers.remove(TRANSFER_ENCODING);
            head.headers.insert(CONTENT_LENGTH, other.len().into());
            whole(other)
        }
        Fault::Header(name, value) => {
            let name = HeaderName::from_bytes(name.as_bytes())?;
            head.headers.remove(&name);
            if !value.is_empty() {
                head.headers.insert(name, HeaderValue::from_str(&value)?);
            }
            whole(bytes.to_vec())
        }
        Fault::ContentLength(length) => {
            head.headers.insert(CONTENT_LENGTH, length.into());
            unsized_body(vec![bytes], false)
        }
        Fault::Endless => {
            head.headers.remove(CONTENT_LENGTH);
            endless()
        }
        Fault::Stall(after) => {
            let part = bytes.slice(..after.min(bytes.len()));
            unsized_body(vec![part], true)
        }
        _ => whole(bytes.to_vec()),
    };
    Ok(Response::from_parts(head, body))
}

fn whole(bytes: Vec<u8>) -> Body {
    Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed()
}

/// Chunks sent by a task through a channel, so that the body has no length of its own.
fn unsized_body(chunks: Vec<Bytes>, then_silence: bool) -> Body {
    let (send, receive) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        for chunk in chunks {
            if send.send(chunk).await.is_err() {
                return;
            }
        }
        if then_silence {
            send.closed().await;
        }
    });
    from_channel(receive)
}

fn endless() -> Body {
    let (send, receive) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        let chunk = Bytes::from(vec![b' '; 64 * 1024]);
        while send.send(chunk.clone()).await.is_ok() {}
    });
    from_channel(receive)
}

fn from_channel(receive: tokio::sync::mpsc::Receiver<Bytes>) -> Body {
    let stream = futures_util::stream::unfold(receive, |mut receive| async move {
        let chunk = receive.recv().await?;
        Some((Ok::<_, BoxError>(Frame::data(chunk)), receive))
    });
    BodyExt::boxed(StreamBody::new(stream))
}

/// `*` matches any run of characters; the pattern is anchored at both ends.
fn wildcard(pattern: &str, text: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(text) = text.strip_prefix(head) else {
        return false;
    };
    (0..=text.len())
        .filter(|at| text.is_char_boundary(*at))
        .any(|at| wildcard(rest, text.get(at..).unwrap_or("")))
}

#[cfg(test)]
mod tests {
    use super::wildcard;

    #[test]
    fn wildcards_are_anchored() {
        assert!(wildcard("/v2/*/manifests/sha256-*.sig", "/v2/a/b/manifests/sha256-00.sig"));
        assert!(wildcard("*", ""));
        assert!(wildcard("/v2/a", "/v2/a"));
        assert!(!wildcard("/v2/a", "/v2/ab"));
        assert!(!wildcard("/v2/*.sig", "/v2/a.sig.att"));
        assert!(!wildcard("v2/*", "/v2/a"));
    }
}
