//! Colours. In a page they follow its theme: the drawing uses placeholders that [`super::Chart::to_svg`] replaces.

use plotters::style::RGBColor;

/// Colours of series before they repeat.
pub const N_SERIES: usize = 6;

/// A colour by its meaning.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Ink {
    /// Text, axes and references.
    Text,
    /// Lines of the scale.
    Grid,
    /// The i-th of several things that are compared.
    Series(usize),
    /// A place from 0 to 1 in an ordered family, such as depth in the model.
    Ordered(f64),
    /// A value from -1 to 1.
    Diverging(f64),
}

/// A set of colours for one background.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Palette {
    pub(crate) background: [u8; 3],
    pub(crate) text: [u8; 3],
    pub(crate) grid: [u8; 3],
    pub(crate) series: [[u8; 3]; N_SERIES],
}

/// For paper and light pages. Series after Okabe and Ito, who chose them for colour-blind readers.
pub const LIGHT: Palette = Palette {
    background: [0xff, 0xff, 0xff],
    text: [0x1f, 0x29, 0x33],
    grid: [0xd9, 0xde, 0xe3],
    series: [[0, 114, 178], [213, 94, 0], [0, 140, 102], [184, 86, 140], [146, 108, 0], [50, 150, 200]],
};

/// For dark pages: the same hues, lighter.
pub const DARK: Palette = Palette {
    background: [0x12, 0x17, 0x1c],
    text: [0xe3, 0xe8, 0xec],
    grid: [0x36, 0x40, 0x4a],
    series: [[98, 182, 240], [255, 152, 84], [76, 208, 164], [232, 160, 202], [226, 190, 88], [160, 214, 246]],
};

impl Palette {
    pub(crate) fn colour(&self, ink: Ink) -> RGBColor {
        let [r, g, b] = match ink {
            Ink::Text => self.text,
            Ink::Grid => self.grid,
            Ink::Series(i) => self.series[i % N_SERIES],
            // Both ends keep away from black and white, so that they show on either background.
            Ink::Ordered(t) => between(&[[88, 80, 190], [38, 150, 160], [110, 190, 80], [236, 172, 48]], t),
            Ink::Diverging(t) => between(
                &[[28, 92, 160], [120, 170, 210], [226, 228, 230], [230, 150, 90], [176, 58, 20]],
                (t + 1.0) / 2.0,
            ),
        };
        RGBColor(r, g, b)
    }
}

/// Stand-ins that occur in no palette, one per theme colour: (stand-in, CSS value).
pub(crate) const PLACEHOLDERS: Palette = Palette {
    background: [1, 2, 3],
    text: [1, 2, 4],
    grid: [1, 2, 5],
    series: [[1, 3, 0], [1, 3, 1], [1, 3, 2], [1, 3, 3], [1, 3, 4], [1, 3, 5]],
};

/// `#rrggbb`, as the SVG backend writes it.
pub(crate) fn hex([r, g, b]: [u8; 3]) -> String {
    format!("#{r:02X}{g:02X}{b:02X}")
}

fn between(stops: &[[u8; 3]], t: f64) -> [u8; 3] {
    let t = if t.is_nan() { 0.5 } else { t.clamp(0.0, 1.0) } * (stops.len() - 1) as f64;
    let first = (t as usize).min(stops.len() - 2);
    let share = t - first as f64;
    let mix = |c: usize| f64::from(stops[first][c]) * (1.0 - share) + f64::from(stops[first + 1][c]) * share;
    [mix(0) as u8, mix(1) as u8, mix(2) as u8]
}
