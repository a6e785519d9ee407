//! Asks the running daemon over its admin socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use super::{AdminArgs, TRANSIENT, USAGE};
use crate::config::{Config, ConfigErrors, DEFAULT_ADMIN, DEFAULT_PATH};

/// Going through a hundred thousand verdicts takes a second or two.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

impl AdminArgs {
    /// The admin socket that was given, or that the configuration names; for the usual configuration
    /// the usual socket, too: the file may be broken, or another than the daemon started with. With
    /// the file's mistakes, if it has any.
    fn sockets(&self) -> (Vec<PathBuf>, Option<ConfigErrors>) {
        if let Some(socket) = &self.admin {
            return (vec![socket.clone()], None);
        }
        let usual = (self.config.config == Path::new(DEFAULT_PATH)).then(|| PathBuf::from(DEFAULT_ADMIN));
        match Config::load(&self.config.config) {
            Ok(loaded) => ([loaded.config.admin].into_iter().chain(usual).collect(), None),
            Err(errors) => (usual.filter(|socket| socket.exists()).into_iter().collect(), Some(errors)),
        }
    }

    /// Whether JSON is wanted.
    pub(super) fn is_json(&self) -> bool {
        self.output == super::Output::Json
    }

    /// One request to the daemon.
    ///
    /// # Errors
    /// The exit status and a sentence with the remedy.
    pub async fn ask(&self, method: Method, path: &str) -> Result<Value, (u8, String)> {
        let (sockets, mistakes) = self.sockets();
        self.ask_one_of(&sockets, method, path).await.map_err(|failed| match mistakes {
            Some(errors) => (USAGE, format!("{errors}\n  help: or give the socket: --admin SOCKET")),
            None => failed,
        })
    }

    async fn ask_one_of(
        &self,
        sockets: &[PathBuf],
        method: Method,
        path: &str,
    ) -> Result<Value, (u8, String)> {
        let (stream, socket) = connect(sockets).await?;
        let answered = tokio::time::timeout(ANSWER_WITHIN, request(stream, method, path)).await;
        let answered = answered.unwrap_or_else(|_| Err("nobody answers".into()));
        let (status, answer) = answered.map_err(|why| away(&socket, &why))?;
        match status.is_success() {
            true => Ok(answer),
            false => Err((
                if status == StatusCode::UNPROCESSABLE_ENTITY { USAGE } else { super::DENIED },
                answer.get("error").and_then(Value::as_str).unwrap_or("the daemon refused").to_owned(),
            )),
        }
    }
}

/// Connects to the first socket on which somebody listens.
async fn connect(sockets: &[PathBuf]) -> Result<(UnixStream, PathBuf), (u8, String)> {
    let mut failed = (TRANSIENT, "no socket is known".to_owned());
    for socket in sockets {
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok((stream, socket.clone())),
            Err(error) => failed = away(socket, &error.to_string()),
        }
    }
    Err(failed)
}

fn away(socket: &Path, why: &str) -> (u8, String) {
    (
        TRANSIENT,
        format!("{}: {why}\n  help: is the daemon running? systemctl status pullgate", socket.display()),
    )
}

async fn request(stream: UnixStream, method: Method, path: &str) -> Result<(StatusCode, Value), String> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    tokio::spawn(connection);
    let request =
        Request::builder().method(method).uri(path).header("host", "pullgate").body(Full::<Bytes>::default());
    let response =
        sender.send_request(request.map_err(|e| e.to_string())?).await.map_err(|e| e.to_string())?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(|e| e.to_string())?.to_bytes();
    Ok((status, serde_json::from_slice(&body).map_err(|e| format!("the answer can't be read: {e}"))?))
}

/// `text` as a value in a query.
pub fn encode(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect()
}
