//! The listener: Unix sockets, from systemd or bound here, and who may speak on them.

pub mod edge;
pub mod serve;

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use listenfd::ListenFd;
use tokio::net::{UnixListener, UnixStream};

/// A listening socket.
pub struct Listener {
    /// Accepts connections.
    pub socket: UnixListener,
    /// Where it is.
    pub path: PathBuf,
    /// Bound here, so removed here; a socket of systemd's stays open while pullgate restarts.
    bound_here: bool,
}

/// The sockets that systemd passed (sd_listen_fds(3)), by path.
pub struct Activated(Vec<(PathBuf, std::os::unix::net::UnixListener)>);

impl Activated {
    /// Takes the sockets from the environment; those that are not Unix sockets are refused.
    ///
    /// # Errors
    /// A sentence.
    pub fn take() -> Result<Self, String> {
        let mut fds = ListenFd::from_env();
        let mut sockets = Vec::new();
        for index in 0..fds.len() {
            let socket =
                fds.take_unix_listener(index).map_err(|e| format!("socket {index} from systemd: {e}"))?;
            let Some(socket) = socket else { continue };
            let address = socket.local_addr().map_err(|e| format!("socket {index} from systemd: {e}"))?;
            let path =
                address.as_pathname().ok_or_else(|| format!("socket {index} from systemd has no path"))?;
            sockets.push((path.to_owned(), socket));
        }
        Ok(Self(sockets))
    }

    /// No sockets.
    pub fn none() -> Self {
        Self(Vec::new())
    }

    /// Sockets that nobody asked for, by path: the unit and the configuration disagree.
    pub fn left_over(&self) -> Vec<&Path> {
        self.0.iter().map(|(path, _)| path.as_path()).collect()
    }

    /// The socket at `path`: systemd's, else one bound now.
    ///
    /// # Errors
    /// A sentence that names the path and the remedy.
    pub async fn listen(&mut self, path: &Path) -> Result<Listener, String> {
        let same = |other: &Path| other == path || canonical(other) == canonical(path);
        if let Some(index) = self.0.iter().position(|(other, _)| same(other)) {
            let (path, socket) = self.0.swap_remove(index);
            socket.set_nonblocking(true).map_err(|e| format!("{}: {e}", path.display()))?;
            let socket = UnixListener::from_std(socket).map_err(|e| format!("{}: {e}", path.display()))?;
            return Ok(Listener { socket, path, bound_here: false });
        }
        bind(path).await
    }
}

impl Listener {
    /// The same socket, with its events on the runtime that asks.
    ///
    /// # Errors
    /// The operating system's.
    pub fn here(self) -> std::io::Result<Self> {
        Ok(Self { socket: UnixListener::from_std(self.socket.into_std()?)?, ..self })
    }

    /// Takes the socket's file away, if it was bound here.
    pub fn remove(&self) {
        if self.bound_here
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "the socket could not be removed");
        }
    }
}

/// Binds `path` with mode 0600, in place of a stale socket that nobody listens on.
async fn bind(path: &Path) -> Result<Listener, String> {
    let shown = path.display();
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(|e| format!("{}: {e}", directory.display()))?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(format!(
                "{shown} is there and is not a socket; remove it or set another `listen` path"
            ));
        }
        Ok(_) if UnixStream::connect(path).await.is_ok() => {
            return Err(format!(
                "another process listens on {shown}; stop it first (is pullgate running already?)"
            ));
        }
        _ => {}
    }
    // Bound under another name, closed to others, then renamed: nobody can connect in between,
    // and a stale socket is replaced in one step.
    let mut new = path.as_os_str().to_owned();
    new.push(format!(".{}", std::process::id()));
    let new = PathBuf::from(new);
    let made = (|| {
        let _ = std::fs::remove_file(&new);
        let socket = UnixListener::bind(&new)?;
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&new, path)?;
        Ok::<_, std::io::Error>(socket)
    })();
    match made {
        Ok(socket) => Ok(Listener { socket, path: path.to_owned(), bound_here: true }),
        Err(error) => {
            let _ = std::fs::remove_file(&new);
            Err(format!("{shown} can't be bound: {error}"))
        }
    }
}

fn canonical(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing() -> Activated {
        Activated::none()
    }

    #[tokio::test]
    async fn a_stale_socket_is_taken_over_and_is_closed_to_others() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let listener = nothing().listen(&path).await.unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(UnixStream::connect(&path).await.is_ok());
        listener.remove();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_live_socket_and_a_plain_file_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let live = directory.path().join("live");
        let _first = nothing().listen(&live).await.unwrap();
        assert!(nothing().listen(&live).await.err().unwrap().contains("another process"));
        let file = directory.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(nothing().listen(&file).await.err().unwrap().contains("not a socket"));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_socket_of_systemds_is_used_and_left_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let given = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mut activated = Activated(vec![(path.clone(), given)]);
        let listener = activated.listen(&path).await.unwrap();
        assert!(activated.left_over().is_empty());
        listener.remove();
        assert!(path.exists());
    }
}
