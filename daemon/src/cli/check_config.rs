//! `pullgate check-config`

use std::path::PathBuf;

use super::{ConfigFile, Ended, OK, USAGE, print};
use crate::config::Config;

/// Arguments of `check-config`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Configuration file; the same as --config FILE
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigFile,
}

/// Checks the file and prints all that is wrong with it.
pub fn check(args: &Args) -> Ended {
    let path = args.file.as_ref().unwrap_or(&args.config.config);
    match Config::load(path) {
        Ok(loaded) => {
            for warning in &loaded.warnings {
                eprintln!("{warning}");
            }
            print(format_args!("{}: good, {} rules", path.display(), loaded.config.policy.rules().len()));
            Ok(OK)
        }
        Err(errors) => {
            eprintln!("{errors}");
            Ok(USAGE)
        }
    }
}
