//! Charts as plain data, and their drawing as SVG (for pages, in the page's colours, or as a file) or PNG.
//!
//! | concept | where |
//! | --- | --- |
//! | lines, heat maps, bars | [`Chart`], [`Series`], [`HeatMap`], [`Bar`], [`Rows`] |
//! | colours that follow the page's theme | [`Ink`] |
//! | drawing | [`Chart::to_svg`], [`Chart::write_svg`], [`Chart::write_png`] |

mod axis;
mod chart;
mod draw;
mod font;
mod output;
mod palette;
mod rows;

pub use axis::Axis;
pub use chart::{Bar, Body, Chart, HeatMap, Row, Rows, Series};
pub use palette::{DARK, Ink, LIGHT, N_SERIES, Palette};
