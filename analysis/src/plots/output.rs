//! A chart as SVG text for a page, or as an SVG or PNG file.

use super::draw::{draw, size};
use super::palette::{LIGHT, N_SERIES, PLACEHOLDERS, hex};
use super::{Chart, font};
use crate::{Error, Result};
use plotters::prelude::{BitMapBackend, IntoDrawingArea, SVGBackend};
use plotters::style::RGBColor;
use std::path::Path;

/// What files are drawn on.
const PAPER: RGBColor = RGBColor(LIGHT.background[0], LIGHT.background[1], LIGHT.background[2]);

impl Chart {
    /// An `<svg>` element for a page: it scales with its column, text is `currentColor`, and lines are the CSS
    /// variables `--grid` and `--series-0` and so on, so that it follows the page's theme.
    ///
    /// # Errors
    /// None in practice; the backend's calls are fallible.
    pub fn to_svg(&self) -> Result<String> {
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, size(self)).into_drawing_area();
            draw(&area, self, &PLACEHOLDERS).and_then(|()| area.present()).map_err(|e| self.failed(&e))?;
        }
        let mut themed = svg
            .replace(&format!("\"{}\"", hex(PLACEHOLDERS.text)), "\"currentColor\"")
            .replace(&format!("\"{}\"", hex(PLACEHOLDERS.grid)), "\"var(--grid)\"");
        for i in 0..N_SERIES {
            let colour = format!("\"{}\"", hex(PLACEHOLDERS.series[i]));
            themed = themed.replace(&colour, &format!("\"var(--series-{i})\""));
        }
        // Inside a page the namespace is known, and the width is the column's.
        let (width, height) = size(self);
        let fixed = format!("<svg width=\"{width}\" height=\"{height}\"");
        Ok(themed.replacen(&fixed, "<svg role=\"img\"", 1).replacen(" xmlns=\"http://www.w3.org/2000/svg\"", "", 1))
    }

    /// An SVG file, on white: it stands alone, and texts are in the reader's own sans-serif.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_svg(&self, path: &Path) -> Result<()> {
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, size(self)).into_drawing_area();
            area.fill(&PAPER).map_err(|e| self.failed(&e))?;
            draw(&area, self, &LIGHT).and_then(|()| area.present()).map_err(|e| self.failed(&e))?;
        }
        std::fs::write(path, svg).map_err(|source| Error::Io { path: path.to_owned(), source })
    }

    /// A PNG file, on white.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_png(&self, path: &Path) -> Result<()> {
        if !font::register() {
            return Err(self.failed(&"the bundled font is damaged"));
        }
        let area = BitMapBackend::new(path, size(self)).into_drawing_area();
        area.fill(&PAPER).map_err(|e| self.failed(&e))?;
        draw(&area, self, &LIGHT).and_then(|()| area.present()).map_err(|e| self.failed(&e))
    }

    fn failed(&self, error: &dyn std::fmt::Display) -> Error {
        Error::Plot { plot: self.title.clone(), reason: error.to_string() }
    }
}
