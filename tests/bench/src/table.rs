//! The one table, on the screen and in `docs/performance.md`.

use anyhow::{Context, Result};
use std::path::Path;
use std::time::Duration;

/// A figure with its bar.
pub struct Row {
    figure: String,
    peer: String,
    ratio: String,
    bar: String,
    met: bool,
}

impl Row {
    /// A time against a peer's, measured in turns; `ratio` is the median of the blocks' ratios.
    pub fn against(figure: &str, ours: Duration, peer: &str, theirs: Duration, ratio: f64, bar: f64) -> Self {
        Self {
            figure: format!("{figure}: {}", time(ours)),
            peer: format!("{peer}: {}", time(theirs)),
            ratio: format!("{ratio:.2}"),
            bar: format!("≤ {bar}"),
            met: ratio <= bar,
        }
    }

    /// [`Row::against`] where to be faster at all is the bar.
    pub fn faster_than(figure: &str, ours: Duration, peer: &str, theirs: Duration, ratio: f64) -> Self {
        let row = Self::against(figure, ours, peer, theirs, ratio, 1.0);
        Self { bar: "< 1".to_owned(), met: ratio < 1.0, ..row }
    }

    /// A figure of its own, in the unit of its bar.
    pub fn alone(figure: &str, ours: f64, unit: &str, bar: f64) -> Self {
        Self {
            figure: format!("{figure}: {} {unit}", short(ours)).trim_end().to_owned(),
            peer: "-".to_owned(),
            ratio: "-".to_owned(),
            bar: format!("≤ {bar} {unit}").trim_end().to_owned(),
            met: ours <= bar,
        }
    }

    /// [`Row::alone`] with a floor to compare with.
    pub fn above(mut self, floor: String, ratio: f64) -> Self {
        (self.peer, self.ratio) = (floor, format!("{ratio:.2}"));
        self
    }

    /// Whether the bar is met.
    pub fn met(&self) -> bool {
        self.met
    }

    fn cells(&self) -> [&str; 5] {
        let met = if self.met { "met" } else { "**missed**" };
        [&self.figure, &self.peer, &self.ratio, &self.bar, met]
    }
}

fn time(time: Duration) -> String {
    let micros = time.as_secs_f64() * 1e6;
    match micros {
        ..1e3 => format!("{micros:.0} µs"),
        ..1e6 => format!("{} ms", short(micros / 1e3)),
        _ => format!("{} s", short(micros / 1e6)),
    }
}

fn short(number: f64) -> String {
    let decimals = if number < 10.0 { 2 } else { usize::from(number < 100.0) };
    format!("{number:.decimals$}")
}

/// The table as Markdown.
pub fn table(rows: &[Row]) -> String {
    let head = ["figure", "floor or peer in the same run", "ratio", "bar", "met or not"];
    let cells: Vec<[&str; 5]> = std::iter::once(head).chain(rows.iter().map(Row::cells)).collect();
    let wide = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 5] = std::array::from_fn(wide);
    let line = |row: &[&str; 5]| {
        let padded = row.iter().zip(widths).map(|(cell, width)| format!(" {cell:width$} |"));
        format!("|{}\n", padded.collect::<String>())
    };
    let rule: String = widths.iter().map(|width| format!(" {} |", "-".repeat(*width))).collect();
    cells.split_first().map_or(String::new(), |(head, rows)| {
        line(head) + &format!("|{rule}\n") + &rows.iter().map(line).collect::<String>()
    })
}

const BEGIN: &str = "<!-- make bench writes from here -->\n";
const END: &str = "<!-- to here -->\n";

/// Replaces what the last run wrote in the document; the words around it are people's.
pub fn write(document: &Path, text: &str) -> Result<()> {
    let old = std::fs::read_to_string(document).with_context(|| document.display().to_string())?;
    let (before, rest) = old.split_once(BEGIN).context("the document has lost its first mark")?;
    let (_, after) = rest.split_once(END).context("the document has lost its second mark")?;
    Ok(std::fs::write(document, format!("{before}{BEGIN}\n{text}\n{END}{after}"))?)
}
