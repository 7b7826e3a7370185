//! Drawing, for any backend. Scales are drawn here, not by plotters' chart builder: it has no say over the places of
//! ticks on a logarithmic scale, nor over a legend beside the plot.

use super::axis::Axis;
use super::palette::Palette;
use super::{Bar, Body, Chart, HeatMap, Ink, Series, font::FAMILY, rows};
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, DrawingAreaErrorKind};
use plotters::element::{Circle, DashedPathElement, PathElement, Polygon, Rectangle, Text};
use plotters::prelude::DrawingBackend;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, FontTransform, IntoFont, ShapeStyle, TextStyle};

/// Width and height of most charts, in pixels.
const SIZE: (u32, u32) = (760, 380);

pub(super) const LEFT: i32 = 66;
const TOP: i32 = 40;
pub(super) const BOTTOM: i32 = 52;
/// Least width of a legend beside a plot; the picture grows with longer labels, and with more of them than are beside it.
const LEGEND: i32 = 160;
const LEGEND_ROW: i32 = 19;
/// Between plot and label, and behind it.
const LEGEND_MARGIN: i32 = 50;
pub(super) const TEXT: f64 = 15.0;

pub(super) type Outcome<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

/// Width and height of `chart`, in pixels.
pub(crate) fn size(chart: &Chart) -> (u32, u32) {
    match &chart.body {
        Body::Rows(rows) => (SIZE.0, rows::height(rows)),
        Body::Lines(series) => {
            let wider = legend_width(series) - LEGEND;
            let labels = series.iter().filter(|s| s.label.is_some()).count() as i32;
            let least = TOP + LEGEND_ROW * labels + BOTTOM;
            (SIZE.0 + wider.max(0) as u32, SIZE.1.max(least as u32))
        }
        _ => SIZE,
    }
}

/// Draws `chart` in the colours of `palette`.
pub(crate) fn draw<DB: DrawingBackend>(area: &DrawingArea<DB, Shift>, chart: &Chart, palette: &Palette) -> Outcome<DB> {
    let canvas = Canvas { area, palette, size: size(chart) };
    canvas.text(&chart.title, (LEFT, 14), 17.0, (HPos::Left, VPos::Center), Ink::Text)?;
    match &chart.body {
        Body::Lines(series) => canvas.lines(chart, series),
        Body::Heat(map) => canvas.heat(chart, map),
        Body::Bars(bars) => canvas.bars(chart, bars),
        Body::Rows(rows) => canvas.rows(chart, rows),
    }
}

pub(super) struct Canvas<'a, DB: DrawingBackend> {
    pub(super) area: &'a DrawingArea<DB, Shift>,
    palette: &'a Palette,
    pub(super) size: (u32, u32),
}

/// The rectangle of the data, and the ends of both scales.
pub(super) struct Frame {
    pub(super) left: i32,
    pub(super) right: i32,
    pub(super) top: i32,
    pub(super) bottom: i32,
    pub(super) x: (f64, f64),
    pub(super) y: (f64, f64),
}

impl Frame {
    fn at(&self, x: f64, y: f64) -> (i32, i32) {
        (self.across(x), self.down(y))
    }

    pub(super) fn across(&self, x: f64) -> i32 {
        self.left + (share(x, self.x) * f64::from(self.right - self.left)).round() as i32
    }

    fn down(&self, y: f64) -> i32 {
        self.bottom - (share(y, self.y) * f64::from(self.bottom - self.top)).round() as i32
    }
}

/// Where `v` lies between two ends, from 0 to 1; a little beyond is allowed, far beyond is cut.
fn share(v: f64, (from, to): (f64, f64)) -> f64 {
    let width = to - from;
    if width == 0.0 || width.is_nan() { 0.5 } else { ((v - from) / width).clamp(-0.02, 1.02) }
}

/// Room for the labels of `series`.
fn legend_width(series: &[Series]) -> i32 {
    let labels = series.iter().filter_map(|s| s.label.as_deref());
    LEGEND.max(rows::width(labels, TEXT - 1.0) + LEGEND_MARGIN)
}

/// What points are marked with.
#[derive(Clone, Copy)]
enum Shape {
    Circle,
    Square,
    Triangle,
}

/// The marker of each series: lines of one colour have different ones, as long as there are some.
fn shapes(series: &[Series]) -> impl Iterator<Item = Shape> {
    const SHAPES: [Shape; 3] = [Shape::Circle, Shape::Square, Shape::Triangle];
    series.iter().enumerate().map(|(i, s)| {
        let earlier = series[..i].iter().filter(|other| other.ink == s.ink && other.markers);
        SHAPES[earlier.count() % SHAPES.len()]
    })
}

impl<DB: DrawingBackend> Canvas<'_, DB> {
    fn lines(&self, chart: &Chart, series: &[Series]) -> Outcome<DB> {
        let named = series.iter().any(|s| s.label.is_some());
        let points = || series.iter().flat_map(|s| s.points.iter());
        let frame = Frame {
            left: LEFT,
            right: self.size.0 as i32 - if named { legend_width(series) } else { 20 },
            top: TOP,
            bottom: self.size.1 as i32 - BOTTOM,
            x: chart.x.ends(points().map(|p| p.0)),
            y: chart.y.ends(points().map(|p| p.1)),
        };
        self.scale_x(&chart.x, &frame)?;
        self.scale_y(&chart.y, &frame)?;
        for (s, shape) in series.iter().zip(shapes(series)) {
            let place = |&(x, y): &(f64, f64)| Some(frame.at(chart.x.place(x)?, chart.y.place(y)?));
            let path: Vec<(i32, i32)> = s.points.iter().filter_map(place).collect();
            let style = self.stroke(s.ink, if s.dashed { 1 } else { 2 });
            if s.dashed {
                self.area.draw(&DashedPathElement::new(path.clone(), 5, 4, style))?;
            } else if path.len() > 1 {
                self.area.draw(&PathElement::new(path.clone(), style))?;
            }
            if s.markers {
                path.into_iter().try_for_each(|point| self.marker(point, shape, s.ink))?;
            }
        }
        self.legend(series, &frame)
    }

    fn legend(&self, series: &[Series], frame: &Frame) -> Outcome<DB> {
        let named = series.iter().zip(shapes(series)).filter_map(|(s, shape)| Some((s, shape, s.label.as_ref()?)));
        for (row, (s, shape, label)) in named.enumerate() {
            let (x, y) = (frame.right + 14, frame.top + 10 + LEGEND_ROW * row as i32);
            let path = vec![(x, y), (x + 20, y)];
            if s.dashed {
                self.area.draw(&DashedPathElement::new(path, 5, 4, self.stroke(s.ink, 1)))?;
            } else {
                self.area.draw(&PathElement::new(path, self.stroke(s.ink, 2)))?;
            }
            if s.markers {
                self.marker((x + 10, y), shape, s.ink)?;
            }
            self.text(label, (x + 26, y), TEXT - 1.0, (HPos::Left, VPos::Center), Ink::Text)?;
        }
        Ok(())
    }

    /// Marks a point.
    fn marker(&self, (x, y): (i32, i32), shape: Shape, ink: Ink) -> Outcome<DB> {
        let style = self.fill(ink);
        match shape {
            Shape::Circle => self.area.draw(&Circle::new((x, y), 4, style)),
            Shape::Square => self.area.draw(&Rectangle::new([(x - 4, y - 4), (x + 4, y + 4)], style)),
            Shape::Triangle => self.area.draw(&Polygon::new([(x, y - 5), (x + 5, y + 4), (x - 5, y + 4)], style)),
        }
    }

    fn heat(&self, chart: &Chart, map: &HeatMap) -> Outcome<DB> {
        let bottom = self.size.1 as i32 - BOTTOM;
        let n = map.n.max(1) as f64;
        let frame =
            Frame { left: LEFT + 130, right: LEFT + 130 + (bottom - TOP), top: TOP, bottom, x: (0.0, n), y: (n, 0.0) };
        for (i, value) in map.values.iter().enumerate() {
            let Some(value) = value else { continue };
            let (row, column) = ((i / map.n) as f64, (i % map.n) as f64);
            // One pixel more than its share, so that no gap shows where edges are rounded.
            let (right, bottom) = frame.at(column + 1.0, row + 1.0);
            let corners = [frame.at(column, row), (right + 1, bottom + 1)];
            self.area.draw(&Rectangle::new(corners, self.fill(Ink::Diverging(value / map.limit))))?;
        }
        self.scale_x(&chart.x, &frame)?;
        self.scale_y(&chart.y, &frame)?;
        self.colour_bar(map, &frame)
    }

    fn colour_bar(&self, map: &HeatMap, frame: &Frame) -> Outcome<DB> {
        const STEPS: i32 = 60;
        let (left, height) = (frame.right + 30, frame.bottom - frame.top);
        for i in 0..STEPS {
            let y = |i: i32| frame.bottom - height * i / STEPS;
            let t = 2.0 * f64::from(i) / f64::from(STEPS - 1) - 1.0;
            let corners = [(left, y(i + 1)), (left + 16, y(i) + 1)];
            self.area.draw(&Rectangle::new(corners, self.fill(Ink::Diverging(t))))?;
        }
        for (t, y) in [(-1.0, frame.bottom), (0.0, (frame.top + frame.bottom) / 2), (1.0, frame.top)] {
            let label = format!("{:+.1}", t * map.limit);
            let label = if t == 0.0 { "0" } else { &label };
            self.text(label, (left + 22, y), TEXT - 1.0, (HPos::Left, VPos::Center), Ink::Text)?;
        }
        self.sideways(&map.legend, (left + 72, (frame.top + frame.bottom) / 2))
    }

    fn bars(&self, chart: &Chart, bars: &[Bar]) -> Outcome<DB> {
        let frame = Frame {
            left: LEFT + 130,
            right: self.size.0 as i32 - 110,
            top: TOP,
            bottom: self.size.1 as i32 - BOTTOM,
            x: chart.x.ends(bars.iter().map(|b| b.value).chain([0.0])),
            y: (0.0, 1.0),
        };
        self.scale_x(&chart.x, &frame)?;
        let step = (frame.bottom - frame.top) / bars.len().max(1) as i32;
        for (i, bar) in bars.iter().enumerate() {
            let middle = frame.top + step * i as i32 + step / 2;
            let half = (step / 3).clamp(2, 22);
            let end = frame.across(chart.x.place(bar.value).unwrap_or(0.0));
            let corners = [(frame.left, middle - half), (end.max(frame.left + 1), middle + half)];
            self.area.draw(&Rectangle::new(corners, self.fill(bar.ink)))?;
            self.text(&bar.label, (frame.left - 8, middle), TEXT, (HPos::Right, VPos::Center), Ink::Text)?;
            self.text(&bar.text, (end + 8, middle), TEXT, (HPos::Left, VPos::Center), Ink::Text)?;
        }
        Ok(())
    }

    pub(super) fn scale_x(&self, axis: &Axis, frame: &Frame) -> Outcome<DB> {
        for (place, label) in axis.ticks(frame.x, 6) {
            let x = frame.across(place);
            self.line([(x, frame.top), (x, frame.bottom)], Ink::Grid)?;
            self.text(&label, (x, frame.bottom + 8), TEXT - 1.0, (HPos::Center, VPos::Top), Ink::Text)?;
        }
        self.line([(frame.left, frame.bottom), (frame.right, frame.bottom)], Ink::Text)?;
        let middle = ((frame.left + frame.right) / 2, self.size.1 as i32 - 8);
        self.text(&axis.label, middle, TEXT, (HPos::Center, VPos::Bottom), Ink::Text)
    }

    fn scale_y(&self, axis: &Axis, frame: &Frame) -> Outcome<DB> {
        let (low, high) = (frame.y.0.min(frame.y.1), frame.y.0.max(frame.y.1));
        for (place, label) in axis.ticks((low, high), 5) {
            let y = frame.down(place);
            self.line([(frame.left, y), (frame.right, y)], Ink::Grid)?;
            self.text(&label, (frame.left - 8, y), TEXT - 1.0, (HPos::Right, VPos::Center), Ink::Text)?;
        }
        self.line([(frame.left, frame.top), (frame.left, frame.bottom)], Ink::Text)?;
        self.sideways(&axis.label, (frame.left - 52, (frame.top + frame.bottom) / 2))
    }

    fn line(&self, ends: [(i32, i32); 2], ink: Ink) -> Outcome<DB> {
        self.area.draw(&PathElement::new(ends.to_vec(), self.stroke(ink, 1)))
    }

    pub(super) fn text(&self, text: &str, at: (i32, i32), size: f64, (h, v): (HPos, VPos), ink: Ink) -> Outcome<DB> {
        let colour = self.palette.colour(ink);
        let style = TextStyle::from((FAMILY, size).into_font()).color(&colour).pos(Pos::new(h, v));
        self.area.draw(&Text::new(text.to_owned(), at, style))
    }

    /// Text that reads upwards, centred on `at`.
    fn sideways(&self, text: &str, at: (i32, i32)) -> Outcome<DB> {
        let font = (FAMILY, TEXT).into_font().transform(FontTransform::Rotate270);
        let colour = self.palette.colour(Ink::Text);
        let style = TextStyle::from(font).color(&colour).pos(Pos::new(HPos::Center, VPos::Center));
        self.area.draw(&Text::new(text.to_owned(), at, style))
    }

    fn stroke(&self, ink: Ink, width: u32) -> ShapeStyle {
        self.palette.colour(ink).stroke_width(width)
    }

    pub(super) fn fill(&self, ink: Ink) -> ShapeStyle {
        self.palette.colour(ink).filled()
    }
}
