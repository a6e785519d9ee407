//! A CRI proxy between pullgate and containerd, as SOCI or stargz would stand there. It notes what it
//! is asked, byte for byte, and answers with more than containerd does, or something else.

use crate::grpc::{self, Client};
use crate::wait;
use anyhow::{Context, Result};
use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::collections::HashMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

type Body = UnsyncBoxBody<Bytes, Infallible>;
type Frames = mpsc::UnboundedReceiver<Frame<Bytes>>;

/// How calls of a method are answered.
#[derive(Clone)]
pub enum Reply {
    /// As containerd does, with these bytes after its message: fields that nobody knows.
    Append(Vec<u8>),
    /// With these headers, messages and trailers.
    Say(HeaderMap, Vec<Bytes>, HeaderMap),
    /// With frames as a test sends them, to one call.
    Live(Arc<Mutex<Option<Frames>>>),
    /// Never.
    Silence,
}

impl Reply {
    /// A reply that the test writes while the caller reads.
    pub fn live() -> (mpsc::UnboundedSender<Frame<Bytes>>, Self) {
        let (frames, receiver) = mpsc::unbounded_channel();
        (frames, Self::Live(Arc::new(Mutex::new(Some(receiver)))))
    }
}

/// A call that came.
#[derive(Clone, Debug)]
pub struct Call {
    /// `runtime.v1.ImageService/PullImage`.
    pub method: String,
    /// The metadata.
    pub headers: HeaderMap,
    /// The whole body, frames and all.
    pub body: Bytes,
    hung_up: watch::Receiver<bool>,
}

impl Call {
    /// The one message.
    pub fn message(&self) -> Result<Bytes> {
        grpc::messages(self.body.clone())?.pop().context("no message")
    }

    /// A value of the metadata, or the empty string.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
    }

    /// Waits until the caller has gone away before the answer was whole.
    pub async fn hung_up(&self) -> Result<()> {
        let mut hung_up = self.hung_up.clone();
        let waited = tokio::time::timeout(wait::LONG, hung_up.wait_for(|gone| *gone)).await;
        waited.context("the call was not cancelled")?.context("the call was answered")?;
        Ok(())
    }
}

/// Tells when it is dropped before its call was answered.
struct Watch {
    hung_up: watch::Sender<bool>,
    answered: bool,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.answered {
            self.hung_up.send_replace(true);
        }
    }
}

#[derive(Default)]
struct State {
    replies: HashMap<String, Reply>,
    calls: Vec<Call>,
}

type Shared = Arc<Mutex<State>>;

fn lock(state: &Shared) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The proxy: lives until dropped.
pub struct NextHop {
    socket: PathBuf,
    containerd: PathBuf,
    state: Shared,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl NextHop {
    /// One that does not listen yet.
    pub fn new(socket: &Path, containerd: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            containerd: containerd.to_owned(),
            state: Shared::default(),
            task: Mutex::default(),
        }
    }

    /// Listens.
    pub fn start(&self) -> Result<()> {
        let listener = UnixListener::bind(&self.socket)?;
        let task = tokio::spawn(accept(listener, self.containerd.clone(), Arc::clone(&self.state)));
        *self.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        Ok(())
    }

    /// Dies, with all its connections. `leave_socket`: its file stays behind, as after a crash.
    pub fn die(&self, leave_socket: bool) {
        if let Some(task) = self.task.lock().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
        if !leave_socket {
            let _ = std::fs::remove_file(&self.socket);
        }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// From now on, calls of `method` are answered like this.
    pub fn reply(&self, method: &str, reply: Reply) {
        lock(&self.state).replies.insert(method.to_owned(), reply);
    }

    /// The calls of `method`, oldest first.
    pub fn calls(&self, method: &str) -> Vec<Call> {
        lock(&self.state).calls.iter().filter(|call| call.method == method).cloned().collect()
    }

    /// Waits for the first call of `method` that came.
    pub async fn called(&self, method: &str) -> Result<Call> {
        let first = async || Ok(self.calls(method).into_iter().next());
        wait::until(&format!("a call of {method}"), wait::LONG, first).await
    }

    /// Forgets the calls.
    pub fn forget(&self) {
        lock(&self.state).calls.clear();
    }
}

impl Drop for NextHop {
    fn drop(&mut self) {
        self.die(false);
    }
}

async fn accept(listener: UnixListener, containerd: PathBuf, state: Shared) {
    // Connections end with this task.
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (containerd, state) = (containerd.clone(), Arc::clone(&state));
        connections.spawn(async move {
            let service = service_fn(move |request| answer(request, containerd.clone(), Arc::clone(&state)));
            let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(request: Request<Incoming>, containerd: PathBuf, state: Shared) -> Result<Response<Body>> {
    let method = request.uri().path().trim_start_matches('/').to_owned();
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let (hung_up, gone) = watch::channel(false);
    let mut watch = Watch { hung_up, answered: false };
    let reply = {
        let mut state = lock(&state);
        let call =
            Call { method: method.clone(), headers: head.headers.clone(), body: body.clone(), hung_up: gone };
        state.calls.push(call);
        state.replies.get(&method).cloned()
    };
    match reply {
        Some(Reply::Say(headers, messages, trailers)) => {
            watch.answered = true;
            Ok(said(headers, messages.iter().map(|message| grpc::frame(message)).collect(), trailers))
        }
        Some(Reply::Live(frames)) => {
            let frames = frames.lock().unwrap_or_else(PoisonError::into_inner).take();
            Ok(response(HeaderMap::new(), live(frames.context("a live reply is for one call")?, watch)))
        }
        Some(Reply::Silence) => std::future::pending().await,
        Some(Reply::Append(more)) => {
            let mut answer = forward(&containerd, &method, &head.headers, body).await?;
            watch.answered = true;
            if let Some(message) = answer.messages.first_mut() {
                *message = [message, more.as_slice()].concat().into();
            }
            Ok(again(answer))
        }
        None => {
            let answer = forward(&containerd, &method, &head.headers, body).await?;
            watch.answered = true;
            Ok(again(answer))
        }
    }
}

async fn forward(containerd: &Path, method: &str, headers: &HeaderMap, body: Bytes) -> Result<grpc::Answer> {
    let own = ["content-type", "te", "content-length"];
    let metadata: Vec<(&str, &str)> = headers
        .iter()
        .filter(|(name, _)| !own.contains(&name.as_str()))
        .filter_map(|(name, value)| Some((name.as_str(), value.to_str().ok()?)))
        .collect();
    grpc::Answer::of(Client::connect(containerd).await?.send(method, &metadata, body).await?).await
}

fn again(answer: grpc::Answer) -> Response<Body> {
    let frames = answer.messages.iter().map(|message| grpc::frame(message)).collect();
    said(answer.headers, frames, answer.trailers)
}

fn said(headers: HeaderMap, frames: Vec<Bytes>, trailers: HeaderMap) -> Response<Body> {
    let trailers = (!trailers.is_empty()).then(|| Frame::trailers(trailers));
    let frames = frames.into_iter().map(Frame::data).chain(trailers).map(Ok::<_, Infallible>);
    response(headers, StreamBody::new(stream::iter(frames.collect::<Vec<_>>())).boxed_unsync())
}

fn live(frames: Frames, watch: Watch) -> Body {
    let frames = stream::unfold((frames, watch), |(mut frames, mut watch)| async move {
        let frame = frames.recv().await?;
        watch.answered = frame.is_trailers();
        Some((Ok::<_, Infallible>(frame), (frames, watch)))
    });
    StreamBody::new(frames).boxed_unsync()
}

fn response(headers: HeaderMap, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.headers_mut() = headers;
    let grpc = hyper::header::HeaderValue::from_static("application/grpc");
    response.headers_mut().entry("content-type").or_insert(grpc);
    response
}
