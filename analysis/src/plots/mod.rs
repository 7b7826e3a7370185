//! Charts as plain data, and their drawing as SVG (for pages, in the page's colours) or PNG.
//!
//! | concept | where |
//! | --- | --- |
//! | lines, heat maps, bars | [`Chart`], [`Series`], [`HeatMap`], [`Bar`] |
//! | colours that follow the page's theme | [`Ink`] |
//! | drawing | [`Chart::to_svg`], [`Chart::write_png`] |

mod axis;
mod chart;
mod draw;
mod font;
mod output;
mod palette;

pub use axis::Axis;
pub use chart::{Bar, Body, Chart, HeatMap, Series};
pub use palette::{DARK, Ink, LIGHT, N_SERIES, Palette};
