//! `pullgate status`

use http::Method;

use super::{AdminArgs, Ended, OK, print};

/// Shows the daemon's status.
pub async fn show(args: AdminArgs) -> Ended {
    let status = args.ask(Method::GET, "/status").await?;
    if args.is_json() {
        print(&status);
        return Ok(OK);
    }
    let Some(fields) = status.as_object() else { return Ok(OK) };
    for (name, value) in fields {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        print(format_args!("{name:<22} {text}"));
    }
    Ok(OK)
}
