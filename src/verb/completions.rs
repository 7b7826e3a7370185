//! `completions`: a completion script for a shell.

use crate::cli::{Cli, Completions};
use clap::CommandFactory;

pub fn completions(args: &Completions) -> anyhow::Result<()> {
    clap_complete::generate(args.shell, &mut Cli::command(), "thermocline", &mut std::io::stdout());
    Ok(())
}
