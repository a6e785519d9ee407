//! `pullgate check-config`

use super::{ConfigFile, Ended, OK, USAGE, print};
use crate::config::Config;

/// Arguments of `check-config`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    config: ConfigFile,
}

/// Checks the file and prints all that is wrong with it.
pub fn check(args: &Args) -> Ended {
    let path = &args.config.config;
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
