//! `demo`.

use crate::cli::Demo;

pub fn demo(_args: &Demo) -> anyhow::Result<()> {
    Ok(())
}
