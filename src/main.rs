//! The `thermocline` binary: options in, exit code out. Each verb is one file under `verb/`.

#![forbid(unsafe_code)]

mod cli;
mod exit;
mod output;
mod settings;
mod verb;

use clap::CommandFactory;
use std::process::ExitCode;

fn main() -> ExitCode {
    exit::quiet_on_broken_pipe();
    let arguments: Vec<_> = std::env::args_os().collect();
    let (command, settings) = match settings::apply(cli::Cli::command(), &arguments) {
        Ok(found) => found,
        Err(error) => return exit::report(&error.into()),
    };
    let mut matches = command.get_matches_from(arguments);
    let cli = match cli::Cli::from_matches(&mut matches) {
        Ok(cli) => cli,
        Err(error) => return exit::report(&error.into()),
    };
    match verb::dispatch(cli.verb, &settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error),
    }
}
