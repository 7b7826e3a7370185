//! `report`.

use crate::cli::Report;

pub fn report(_args: &Report) -> anyhow::Result<()> {
    Ok(())
}
