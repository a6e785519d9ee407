//! A registry in a test: a socket on loopback that says what the test wants, and remembers
//! what it was asked.

use std::sync::{Arc, Mutex};

use http::StatusCode;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// One request as it came.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// `GET /v2/a/manifests/latest`, query included.
    pub(super) line: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: String,
    /// The number of the connection it came on.
    pub(super) connection: usize,
}

impl Seen {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// What the server does.
#[derive(Clone, Debug)]
pub(super) enum Reply {
    Answer {
        status: StatusCode,
        headers: Vec<(String, String)>,
        body: Vec<u8>,
    },
    /// Nothing, for ever.
    Hang,
    /// The connection is closed at once.
    Close,
    /// A body that says it is longer than it is.
    Truncated,
    /// A body without end.
    Endless,
}

impl Reply {
    pub(super) fn status(status: StatusCode, body: impl Into<Vec<u8>>) -> Self {
        Self::Answer { status, headers: Vec::new(), body: body.into() }
    }

    pub(super) fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self::status(StatusCode::OK, body)
    }

    pub(super) fn code(code: u16) -> Self {
        Self::status(StatusCode::from_u16(code).unwrap(), "")
    }

    pub(super) fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        if let Self::Answer { headers, .. } = &mut self {
            headers.push((name.to_owned(), value.into()));
        }
        self
    }
}

type Handler = dyn Fn(&Seen) -> Reply + Send + Sync;

/// Dropped, it is gone.
pub(super) struct Server {
    /// `127.0.0.1:port`.
    pub(super) address: String,
    scheme: &'static str,
    seen: Arc<Mutex<Vec<Seen>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(super) async fn new(handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::start(None, Arc::new(handler)).await
    }

    pub(super) async fn tls(
        config: rustls::ServerConfig,
        handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::start(Some(TlsAcceptor::from(Arc::new(config))), Arc::new(handler)).await
    }

    async fn start(tls: Option<TlsAcceptor>, handler: Arc<Handler>) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let log = seen.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            for connection in 0.. {
                let Ok((stream, _)) = listener.accept().await else { return };
                let (tls, handler, log) = (tls.clone(), handler.clone(), log.clone());
                connections.spawn(async move {
                    match tls {
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, connection, &*handler, &log).await;
                            }
                        }
                        None => serve(stream, connection, &*handler, &log).await,
                    }
                });
            }
        });
        Self { address, scheme, seen, task }
    }

    pub(super) fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// The request lines, in order.
    pub(super) fn lines(&self) -> Vec<String> {
        self.seen().into_iter().map(|seen| seen.line).collect()
    }
}

async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    connection: usize,
    handler: &Handler,
    log: &Mutex<Vec<Seen>>,
) {
    while let Some(seen) = read(&mut stream, connection).await {
        log.lock().unwrap().push(seen.clone());
        let reply = handler(&seen);
        if write(&mut stream, &seen, reply).await.is_none() {
            return;
        }
    }
}

async fn read(stream: &mut (impl AsyncRead + Unpin), connection: usize) -> Option<Seen> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
        // What is not HTTP (a TLS greeting) is answered as Go's server does.
        if head.first() == Some(&0x16) {
            return Some(Seen { line: "TLS".into(), headers: Vec::new(), body: String::new(), connection });
        }
    }
    let text = String::from_utf8(head).ok()?;
    let mut lines = text.lines();
    let line = lines.next()?.trim_end_matches(" HTTP/1.1").to_owned();
    let headers: Vec<_> =
        lines.filter_map(|line| line.split_once(": ")).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    let mut seen = Seen { line, headers, body: String::new(), connection };
    let length = seen.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    seen.body = String::from_utf8(body).ok()?;
    Some(seen)
}

/// `None` ends the connection.
async fn write(stream: &mut (impl AsyncWrite + Unpin), seen: &Seen, reply: Reply) -> Option<()> {
    if seen.line == "TLS" {
        let _ = stream.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTPS request").await;
        return None;
    }
    match reply {
        Reply::Answer { status, headers, body } => {
            let mut head = format!("HTTP/1.1 {}\r\n", status.as_u16());
            for (name, value) in headers {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
            head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
            stream.write_all(head.as_bytes()).await.ok()?;
            if !seen.line.starts_with("HEAD ") {
                stream.write_all(&body).await.ok()?;
            }
            stream.flush().await.ok()
        }
        Reply::Hang => std::future::pending().await,
        Reply::Close => None,
        Reply::Truncated => {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort").await.ok()?;
            None
        }
        Reply::Endless => {
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.ok()?;
            loop {
                stream.write_all(&[b'x'; 4096]).await.ok()?;
            }
        }
    }
}
