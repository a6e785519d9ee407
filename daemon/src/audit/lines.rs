//! Events as lines on stderr: JSON with the journal's field names, or text for a terminal.

use std::fmt::{Debug, Write as _};
use std::io::Write as _;
use std::time::SystemTime;

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// How a line looks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// The journal's fields, one JSON object a line.
    Json,
    /// For people.
    Text,
}

/// Writes events to stderr.
pub struct Lines(pub Form);

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let line = match self.0 {
            Form::Json => {
                let mut entry = fields.0;
                entry.insert("PRIORITY".into(), priority(metadata.level()).into());
                entry.insert("TARGET".into(), metadata.target().into());
                entry.insert("SYSLOG_IDENTIFIER".into(), "pullgate".into());
                let now = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
                entry.insert("TIMESTAMP".into(), now.into());
                Value::Object(entry).to_string()
            }
            Form::Text => fields.text(metadata.level().as_str()),
        };
        // There is nobody to tell when stderr is closed.
        let _ = writeln!(std::io::stderr().lock(), "{line}");
    }
}

/// syslog(3) priorities, as tracing-journald gives them.
fn priority(level: &tracing::Level) -> &'static str {
    match *level {
        tracing::Level::ERROR => "3",
        tracing::Level::WARN => "4",
        tracing::Level::INFO => "5",
        tracing::Level::DEBUG => "6",
        tracing::Level::TRACE => "7",
    }
}

#[derive(Default)]
struct Fields(Map<String, Value>);

impl Fields {
    fn text(&self, level: &str) -> String {
        let message = self.0.get("MESSAGE").and_then(Value::as_str).unwrap_or_default();
        let mut line = format!("{level:5} {message}");
        let told = |name: &str| name == "MESSAGE" || name == "MESSAGE_ID" || name.starts_with("PULLGATE_");
        for (name, value) in self.0.iter().filter(|(name, _)| !told(name)) {
            // Writing into a String can't fail.
            let _ = write!(line, " {}={value}", name.to_lowercase());
        }
        line
    }

    fn put(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_uppercase(), value.into());
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put(field, format!("{value:?}"));
    }
}
