//! Asks the running daemon over its admin socket.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use super::{AdminArgs, TRANSIENT, USAGE};
use crate::config::{Config, DEFAULT_ADMIN};

impl AdminArgs {
    /// The admin socket: given, or named by the configuration.
    fn socket(&self) -> Result<PathBuf, (u8, String)> {
        match &self.admin {
            Some(socket) => Ok(socket.clone()),
            None => match Config::load(&self.config.config) {
                Ok(loaded) => Ok(loaded.config.admin),
                // The daemon may be well, with the file that was there before.
                Err(_) if Path::new(DEFAULT_ADMIN).exists() => Ok(DEFAULT_ADMIN.into()),
                Err(errors) => Err((USAGE, format!("{errors}\n  help: or give the socket: --admin SOCKET"))),
            },
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
        let socket = self.socket()?;
        let (status, answer) = request(&socket, method, path).await.map_err(|why| {
            (
                TRANSIENT,
                format!(
                    "{}: {why}\n  help: is the daemon running? systemctl status pullgate",
                    socket.display()
                ),
            )
        })?;
        match status.is_success() {
            true => Ok(answer),
            false => Err((
                if status == StatusCode::UNPROCESSABLE_ENTITY { USAGE } else { super::DENIED },
                answer.get("error").and_then(Value::as_str).unwrap_or("the daemon refused").to_owned(),
            )),
        }
    }
}

async fn request(socket: &Path, method: Method, path: &str) -> Result<(StatusCode, Value), String> {
    let stream = UnixStream::connect(socket).await.map_err(|e| e.to_string())?;
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
