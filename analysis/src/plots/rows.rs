//! Rows of horizontal bars under a legend.

use super::draw::{BOTTOM, Canvas, Frame, LEFT, Outcome, TEXT};
use super::{Chart, Ink, Rows};
use plotters::element::Rectangle;
use plotters::prelude::DrawingBackend;
use plotters::style::text_anchor::{HPos, VPos};

/// Below title and legend.
const TOP: i32 = 66;
/// What the rows share if they are few.
const HEIGHT: i32 = 240;
/// Texts beside rows.
const SMALL: f64 = TEXT - 2.0;

/// Pixels of a chart with these rows.
pub(super) fn height(rows: &Rows) -> u32 {
    (TOP + step(rows) * rows.rows.len().max(1) as i32 + BOTTOM) as u32
}

/// Pixels from one row to the next.
fn step(rows: &Rows) -> i32 {
    let least = if rows.stacked { 22 } else { 8 + 10 * rows.legend.len() as i32 };
    (HEIGHT / rows.rows.len().max(1) as i32).clamp(least, 2 * least)
}

/// Somewhat wider than a text is drawn: the reader's font is not known.
pub(super) fn width<'a>(texts: impl Iterator<Item = &'a str>, size: f64) -> i32 {
    let longest = texts.map(|t| t.chars().count()).max().unwrap_or(0);
    (longest as f64 * size * 0.54).ceil() as i32
}

impl<DB: DrawingBackend> Canvas<'_, DB> {
    pub(super) fn rows(&self, chart: &Chart, rows: &Rows) -> Outcome<DB> {
        let finite = |v: &f64| if v.is_finite() { *v } else { 0.0 };
        let lengths = rows.rows.iter().map(|r| {
            let values = r.values.iter().map(finite);
            if rows.stacked { values.sum() } else { values.fold(0.0, f64::max) }
        });
        let frame = Frame {
            left: 16 + width(rows.rows.iter().map(|r| r.label.as_str()), SMALL),
            right: self.size.0 as i32 - 12 - width(rows.rows.iter().map(|r| r.text.as_str()), SMALL),
            top: TOP,
            bottom: self.size.1 as i32 - BOTTOM,
            x: chart.x.ends(lengths.clone().chain([0.0])),
            y: (0.0, 1.0),
        };
        self.swatches(rows)?;
        self.scale_x(&chart.x, &frame)?;
        let step = step(rows);
        for (i, (row, length)) in rows.rows.iter().zip(lengths).enumerate() {
            let (top, bottom) = (frame.top + step * i as i32 + step / 8, frame.top + step * (i as i32 + 1) - step / 8);
            let (n, mut sum) = (row.values.len().max(1) as i32, 0.0);
            for (k, (value, (_, ink))) in row.values.iter().map(finite).zip(&rows.legend).enumerate() {
                let edge = |k: i32| top + (bottom - top) * k / n;
                let (from, to) = if rows.stacked { (top, bottom) } else { (edge(k as i32), edge(k as i32 + 1) - 1) };
                let start = if rows.stacked { sum } else { 0.0 };
                sum += value;
                if value > 0.0 {
                    let corners = [(frame.across(start), from), (frame.across(start + value), to)];
                    self.area.draw(&Rectangle::new(corners, self.fill(*ink)))?;
                }
            }
            let middle = f64::midpoint(f64::from(top), f64::from(bottom)) as i32;
            self.text(&row.label, (frame.left - 8, middle), SMALL, (HPos::Right, VPos::Center), Ink::Text)?;
            let end = frame.across(length) + 8;
            self.text(&row.text, (end, middle), SMALL, (HPos::Left, VPos::Center), Ink::Text)?;
        }
        Ok(())
    }

    /// The legend, in one line below the title.
    fn swatches(&self, rows: &Rows) -> Outcome<DB> {
        let (mut x, y) = (LEFT, 44);
        for (name, ink) in &rows.legend {
            self.area.draw(&Rectangle::new([(x, y - 5), (x + 14, y + 5)], self.fill(*ink)))?;
            self.text(name, (x + 20, y), TEXT - 1.0, (HPos::Left, VPos::Center), Ink::Text)?;
            x += 44 + width([*name].into_iter(), TEXT - 1.0);
        }
        Ok(())
    }
}
