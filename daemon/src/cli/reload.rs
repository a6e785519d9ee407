//! `pullgate reload`

use http::Method;

use super::{AdminArgs, Ended, OK, print};

/// Has the daemon read its configuration anew.
pub async fn reload(args: AdminArgs) -> Ended {
    let answer = args.ask(Method::POST, "/reload").await?;
    let policy = answer.get("policy").and_then(|policy| policy.as_str()).unwrap_or_default();
    match args.is_json() {
        true => print(&answer),
        false => print(format_args!("the file is in force, as policy {policy}")),
    }
    Ok(OK)
}
