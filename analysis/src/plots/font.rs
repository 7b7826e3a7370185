//! The bundled font: bitmaps need its outlines, and no system can be trusted to have one.

use plotters::style::{FontStyle, register_font};
use std::sync::OnceLock;

/// DejaVu Sans; its licence lies beside it.
static DEJAVU_SANS: &[u8] = include_bytes!("../../assets/DejaVuSans.ttf");

/// The name under which charts ask for it; in a page, the reader's own sans-serif.
pub(crate) const FAMILY: &str = "sans-serif";

/// Makes the font known to plotters, once; whether it is.
pub(crate) fn register() -> bool {
    static DONE: OnceLock<bool> = OnceLock::new();
    *DONE.get_or_init(|| register_font(FAMILY, FontStyle::Normal, DEJAVU_SANS).is_ok())
}
