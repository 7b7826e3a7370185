//! The `thermocline` binary: options in, exit code out. Each verb is one file under `verb/`.

#![forbid(unsafe_code)]

mod cli;
mod exit;
mod output;
mod verb;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    exit::quiet_on_broken_pipe();
    let cli = cli::Cli::parse();
    match verb::dispatch(cli.verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error),
    }
}
