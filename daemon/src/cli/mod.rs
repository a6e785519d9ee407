//! The command line. `pullgate run` is the daemon; the other subcommands serve people.

pub mod admin_client;
mod cache;
mod check_config;
mod keys;
mod reload;
mod status;
mod verify;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};

/// Allowed, or done.
pub const OK: u8 = 0;
/// Denied.
pub const DENIED: u8 = 1;
/// The command line or the configuration is wrong.
pub const USAGE: u8 = 2;
/// It could not be found out; another try may.
pub const TRANSIENT: u8 = 3;

/// Proves that an image is allowed before containerd pulls it.
///
/// pullgate stands between the kubelet and containerd (kubelet: imageServiceEndpoint). It
/// verifies who signed each image, and has containerd pull exactly the digest that it proved.
#[derive(Parser, Debug)]
#[command(
    name = "pullgate",
    version,
    after_help = "\
Examples:
  pullgate check-config                      check /etc/pullgate/config.yaml
  pullgate verify docker.io/library/a:1      what would happen to this image, and why
  pullgate run                               the daemon, as the systemd unit starts it
  pullgate status                            what the running daemon says of itself

Exit status: 0 allowed or done, 1 denied, 2 usage or configuration, 3 try again."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the daemon
    #[command(after_help = "Example:\n  pullgate run --config /etc/pullgate/config.yaml")]
    Run(ConfigFile),
    /// Judge an image as the daemon would; needs neither daemon nor containerd
    #[command(after_help = "\
Examples:
  pullgate verify registry.example.com/app:1.2
  pullgate verify --output json registry.example.com/app@sha256:DIGEST | jq .reason")]
    Verify(verify::Args),
    /// Check a configuration file; every mistake at once
    #[command(after_help = "Example:\n  pullgate check-config ./config.yaml && systemctl reload pullgate")]
    CheckConfig(check_config::Args),
    /// Show what the running daemon says of itself
    #[command(after_help = "\
Examples:
  pullgate status
  pullgate status --output json | jq .configError")]
    Status(AdminArgs),
    /// Have the running daemon read its configuration anew; a file with mistakes changes nothing
    #[command(after_help = "\
Example:
  pullgate reload

Exit status: 0 the file is in force, 2 it is refused, with every mistake, and the old policy stays
in force, 3 the daemon does not answer.")]
    Reload(AdminArgs),
    /// Look at, or forget, the verdicts that the running daemon remembers
    #[command(subcommand, after_help = "Example:\n  pullgate cache stats")]
    Cache(cache::Command),
    /// Look at the pinned keys, or accept a re-pointed alias
    #[command(subcommand, after_help = "Example:\n  pullgate keys list")]
    Keys(keys::Command),
    /// Print a shell completion script
    #[command(after_help = "Example:\n  pullgate completions bash > /etc/bash_completion.d/pullgate")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages (roff) into a directory
    #[command(after_help = "Example:\n  pullgate man /usr/local/share/man/man1")]
    Man {
        /// The directory
        directory: PathBuf,
    },
}

/// Which configuration file.
#[derive(clap::Args, Debug, Clone)]
pub struct ConfigFile {
    /// Configuration file
    #[arg(long, short, value_name = "FILE", default_value = crate::config::DEFAULT_PATH, env = "PULLGATE_CONFIG")]
    pub config: PathBuf,
}

/// Which form of output.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum Output {
    /// For people
    #[default]
    Text,
    /// One JSON object
    Json,
}

/// A command to the running daemon.
#[derive(clap::Args, Debug, Clone)]
pub struct AdminArgs {
    #[command(flatten)]
    config: ConfigFile,
    /// The daemon's admin socket, instead of the one that the configuration names
    #[arg(long, value_name = "SOCKET")]
    admin: Option<PathBuf>,
    /// Form of the output
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,
}

/// What a command ends with: its exit status, or a sentence and the exit status for it.
pub type Ended = Result<u8, (u8, String)>;

/// Runs the command line.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // Only one provider can be installed, and nothing was before.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let ended = match cli.command {
        Command::Run(args) => crate::daemon::run(&args.config),
        Command::Verify(args) => command(verify::verify(args)),
        Command::CheckConfig(args) => check_config::check(&args),
        Command::Status(args) => command(status::show(args)),
        Command::Reload(args) => command(reload::reload(args)),
        Command::Cache(cache) => command(cache::run(cache)),
        Command::Keys(keys) => command(keys::run(keys)),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "pullgate", &mut std::io::stdout());
            Ok(OK)
        }
        Command::Man { directory } => clap_mangen::generate_to(Cli::command(), &directory)
            .map(|()| OK)
            .map_err(|error| (USAGE, format!("{}: {error}", directory.display()))),
    };
    match ended {
        Ok(code) => ExitCode::from(code),
        Err((code, text)) => {
            // A configuration's mistakes bring the word along.
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            let _ = writeln!(std::io::stderr(), "error: {text}");
            ExitCode::from(code)
        }
    }
}

/// Runs a short command on a small runtime.
fn command(work: impl Future<Output = Ended>) -> Ended {
    crate::audit::logging::for_command();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| (TRANSIENT, error.to_string()))?.block_on(work)
}

/// Prints to stdout; a reader that went away (`| head`) is no error.
fn print(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
