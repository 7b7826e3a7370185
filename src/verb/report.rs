//! `report`: splits, profiles and results in, one HTML page out.

use crate::cli::Report;
use std::path::Path;
use thermocline_analysis::report::{Inputs, Page};

pub fn report(args: &Report) -> anyhow::Result<()> {
    let page = write(&args.inputs, &args.output)?;
    if let Some(dir) = &args.png {
        page.write_png(dir)?;
    }
    if let Some(dir) = &args.svg {
        page.write_svg(dir)?;
    }
    println!("{}", args.output.display());
    Ok(())
}

/// Writes the page.
pub fn write(inputs: &[std::path::PathBuf], output: &Path) -> anyhow::Result<Page> {
    let page = Page::new(Inputs::read(inputs)?, std::env::args().skip(1).collect())?;
    page.write(output)?;
    Ok(page)
}
