//! `report`: splits, profiles and results in, one HTML page out.

use crate::cli::Report;
use std::path::Path;
use thermocline_analysis::report::{Inputs, Page};

pub fn report(args: &Report) -> anyhow::Result<()> {
    write(&args.inputs, &args.output, args.png.as_deref())?;
    println!("{}", args.output.display());
    Ok(())
}

/// Writes the page and, if asked for, its charts.
pub fn write(inputs: &[std::path::PathBuf], output: &Path, png: Option<&Path>) -> anyhow::Result<()> {
    let page = Page::new(Inputs::read(inputs)?, std::env::args().skip(1).collect())?;
    page.write(output)?;
    if let Some(dir) = png {
        page.write_png(dir)?;
    }
    Ok(())
}
