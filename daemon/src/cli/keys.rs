//! `pullgate keys list|accept`

use http::Method;

use super::admin_client::encode;
use super::{AdminArgs, Ended, OK, print};

/// What to do with the pinned keys.
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// List the pinned keys, and aliases that point at another key now
    #[command(after_help = "Example:\n  pullgate keys list")]
    List(AdminArgs),
    /// Trust the key that an alias points at now
    #[command(after_help = "\
Example:
  pullgate keys list
  pullgate keys accept awskms:///alias/ci --sha256 SHA256")]
    Accept {
        #[command(flatten)]
        admin: AdminArgs,
        /// The key's URI, as the rule has it or as `list` prints it
        uri: String,
        /// The new key's SHA-256, as `list` prints it: another key is not accepted
        #[arg(long, value_name = "HEX")]
        sha256: Option<String>,
    },
}

/// Runs one of the commands.
pub async fn run(command: Command) -> Ended {
    let (admin, answer) = match command {
        Command::List(admin) => {
            let answer = admin.ask(Method::GET, "/keys").await?;
            (admin, answer)
        }
        Command::Accept { admin, uri, sha256 } => {
            let sha256 = sha256.map(|sha256| format!("&sha256={}", encode(&sha256))).unwrap_or_default();
            let answer =
                admin.ask(Method::POST, &format!("/keys/accept?uri={}{sha256}", encode(&uri))).await?;
            (admin, answer)
        }
    };
    match admin.is_json() {
        true => print(&answer),
        false => print(serde_json::to_string_pretty(&answer).unwrap_or_default()),
    }
    Ok(OK)
}
