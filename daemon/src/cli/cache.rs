//! `pullgate cache stats|list|show|purge`

use http::Method;
use serde_json::Value;

use super::admin_client::encode;
use super::{AdminArgs, Ended, OK, USAGE, print};

/// What to do with the verdict cache.
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// How many verdicts there are, and how large they are
    #[command(after_help = "Example:\n  pullgate cache stats --output json")]
    Stats(AdminArgs),
    /// List verdicts, the newest first
    #[command(
        after_help = "Example:\n  pullgate cache list --image 'registry.example.com/team/*' --decision deny"
    )]
    List {
        #[command(flatten)]
        admin: AdminArgs,
        #[command(flatten)]
        filter: Filter,
        /// At most so many
        #[arg(long, default_value_t = 100)]
        limit: usize,
    },
    /// Show one verdict
    #[command(after_help = "Example:\n  pullgate cache show 3f9a")]
    Show {
        #[command(flatten)]
        admin: AdminArgs,
        /// The verdict's key, or the start of it, as `list` prints it
        key: String,
    },
    /// Forget verdicts; they are worked out again when they are needed
    #[command(after_help = "\
Examples:
  pullgate cache purge --image 'registry.example.com/app'
  pullgate cache purge --all")]
    Purge {
        #[command(flatten)]
        admin: AdminArgs,
        #[command(flatten)]
        filter: Filter,
        /// Forget every verdict
        #[arg(long)]
        all: bool,
    },
}

/// Which verdicts.
#[derive(clap::Args, Debug)]
pub struct Filter {
    /// Repositories that match this glob
    #[arg(long, value_name = "GLOB")]
    image: Option<String>,
    /// Only this digest
    #[arg(long)]
    digest: Option<String>,
    /// Only `allow` or `deny`
    #[arg(long, value_parser = ["allow", "deny"])]
    decision: Option<String>,
}

impl Filter {
    fn query(&self) -> String {
        let pair = |name: &str, value: &Option<String>| {
            value.as_ref().map(|value| format!("&{name}={}", encode(value))).unwrap_or_default()
        };
        [pair("image", &self.image), pair("digest", &self.digest), pair("decision", &self.decision)].concat()
    }
}

/// Runs one of the commands.
pub async fn run(command: Command) -> Ended {
    match command {
        Command::Stats(admin) => {
            let stats = admin.ask(Method::GET, "/cache/stats").await?;
            show(&admin, &stats);
        }
        Command::List { admin, filter, limit } => {
            let listed = admin.ask(Method::GET, &format!("/cache?limit={limit}{}", filter.query())).await?;
            match admin.is_json() {
                true => print(&listed),
                false => table(&listed),
            }
        }
        Command::Show { admin, key } => {
            let entry = admin.ask(Method::GET, &format!("/cache/entry?key={}", encode(&key))).await?;
            show(&admin, &entry);
        }
        Command::Purge { admin, filter, all } => {
            if all != filter.query().is_empty() {
                return Err((USAGE, "say which verdicts: --image, --digest, --decision, or --all".into()));
            }
            let purged = admin.ask(Method::DELETE, &format!("/cache?all={all}{}", filter.query())).await?;
            show(&admin, &purged);
        }
    }
    Ok(OK)
}

fn show(admin: &AdminArgs, value: &Value) {
    match admin.is_json() {
        true => print(value),
        false => print(serde_json::to_string_pretty(value).unwrap_or_default()),
    }
}

fn table(listed: &Value) {
    let text = |entry: &Value, field: &str| entry[field].as_str().unwrap_or_default().to_owned();
    print(format_args!("{:<14} {:<6} {:<20} {:<8} IMAGE", "KEY", "", "REASON", "AGE"));
    for entry in listed["entries"].as_array().into_iter().flatten() {
        let key: String = text(entry, "key").chars().take(12).collect();
        let age = humantime::format_duration(std::time::Duration::from_secs(
            entry["ageSeconds"].as_u64().unwrap_or(0),
        ));
        let age = age.to_string().split(' ').take(2).collect::<String>();
        let image = format!("{}@{}", text(entry, "repository"), text(entry, "digest"));
        print(format_args!(
            "{key:<14} {:<6} {:<20} {age:<8} {image}",
            text(entry, "decision"),
            text(entry, "reason")
        ));
    }
    print(format_args!(
        "{} of {} verdicts",
        listed["entries"].as_array().map_or(0, Vec::len),
        listed["matching"]
    ));
}
