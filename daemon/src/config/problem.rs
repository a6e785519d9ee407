//! What is wrong with a configuration file, told as rustc tells it.

use std::cell::RefCell;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// More than this many errors are counted, not shown.
const SHOWN: usize = 50;

/// A place in the file: both from 1; 0 where the file as a whole is meant.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Position {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
}

/// Whether a problem stops the file from being used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Severity {
    /// The file is refused.
    Error,
    /// The file is used; somebody should look at it.
    Warning,
}

/// One thing that is wrong, or odd, in a configuration file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Error or warning.
    pub severity: Severity,
    /// The file.
    pub file: Arc<Path>,
    /// Where in the file.
    pub at: Position,
    /// The field, as `verificationRules[2].strategy`; empty for the file as a whole.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub help: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        write!(f, "{kind}: {}", self.file.display())?;
        if self.at.line > 0 {
            write!(f, ":{}:{}", self.at.line, self.at.column)?;
        }
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.message)?;
        match &self.help {
            Some(help) => write!(f, "\n  help: {help}"),
            None => Ok(()),
        }
    }
}

/// Every error of a file at once, in the order of its lines.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigErrors(Vec<Problem>);

impl ConfigErrors {
    /// The errors, in the order of the file's lines. There is at least one.
    pub fn problems(&self) -> &[Problem] {
        &self.0
    }

    pub(super) fn of_file(file: &Path, message: String, help: Option<String>) -> Self {
        let report = Report::new(file);
        report.error(Position::default(), "", Complaint { message, help });
        Self(report.finish().0)
    }

    pub(super) fn new(problems: Vec<Problem>) -> Self {
        Self(problems)
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().take(SHOWN).enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{problem}")?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "\n… and {more} more errors"),
        }
    }
}

impl std::error::Error for ConfigErrors {}

/// What is wrong with a value, before anybody knows where it stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Complaint {
    pub message: String,
    pub help: Option<String>,
}

impl Complaint {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), help: None }
    }

    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// Collects the problems of one file.
pub(super) struct Report {
    file: Arc<Path>,
    problems: RefCell<Vec<Problem>>,
}

impl Report {
    pub fn new(file: &Path) -> Self {
        Self { file: file.into(), problems: RefCell::default() }
    }

    pub fn error(&self, at: Position, field: impl Into<String>, complaint: Complaint) {
        self.add(Severity::Error, at, field.into(), complaint);
    }

    pub fn warning(&self, at: Position, field: impl Into<String>, complaint: Complaint) {
        self.add(Severity::Warning, at, field.into(), complaint);
    }

    fn add(&self, severity: Severity, at: Position, field: String, Complaint { message, help }: Complaint) {
        let problem = Problem { severity, file: self.file.clone(), at, field, message, help };
        self.problems.borrow_mut().push(problem);
    }

    /// The errors and the warnings, each in the order of the file's lines.
    pub fn finish(self) -> (Vec<Problem>, Vec<Problem>) {
        let mut problems = self.problems.into_inner();
        problems.sort_by_key(|problem| problem.at);
        problems.into_iter().partition(|problem| problem.severity == Severity::Error)
    }
}
