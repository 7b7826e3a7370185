//! Progress for people and pipes.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::cell::Cell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// A bar with an ETA on a terminal; in a pipe a plain line to standard error every ten seconds, none for short work.
pub struct Progress {
    bar: ProgressBar,
    what: &'static str,
    plain: bool,
    last: Cell<Instant>,
}

impl Progress {
    /// `what` names the work in progress: `calibrate`, `split`, ...
    pub fn new(what: &'static str, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal && !quiet { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        let style = ProgressStyle::with_template("{prefix:>10} {bar:32} {percent:>3}%  {msg}  eta {eta}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(what);
        Self { bar, what, plain: !terminal && !quiet, last: Cell::new(Instant::now()) }
    }

    /// `done` of `total`, in any unit; `message` says where the work is.
    pub fn set(&self, done: u64, total: u64, message: String) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        if self.plain && self.last.get().elapsed() > Duration::from_secs(10) {
            self.last.set(Instant::now());
            eprintln!("{}: {:.0} %, {message}", self.what, 100.0 * done as f64 / total.max(1) as f64);
        }
        self.bar.set_message(message);
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    /// A line that stays, above the bar if there is one. It is said even where progress is not: something is not as the
    /// user expects.
    pub fn note(&self, line: &str) {
        if self.bar.is_hidden() {
            eprintln!("{}: {line}", self.what);
        } else {
            self.bar.println(line);
        }
    }
}

/// One pretty JSON value on standard output.
pub fn json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}
