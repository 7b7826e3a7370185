use super::{Axis, Ink};

/// One chart.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    /// Heading, drawn above.
    pub title: String,
    /// Horizontal axis.
    pub x: Axis,
    /// Vertical axis.
    pub y: Axis,
    /// What is drawn.
    pub body: Body,
}

/// The kinds of charts.
#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    /// Lines, in drawing order.
    Lines(Vec<Series>),
    /// A matrix as coloured cells.
    Heat(HeatMap),
    /// Horizontal bars, from the top; the vertical axis has no scale.
    Bars(Vec<Bar>),
    /// Several horizontal bars for each of many things, from the top; the vertical axis has no scale.
    Rows(Rows),
}

/// One line.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Name in the legend; lines without one are left out there.
    pub label: Option<String>,
    /// (x, y); points that are not finite interrupt nothing and are left out.
    pub points: Vec<(f64, f64)>,
    /// Colour.
    pub ink: Ink,
    /// Whether points are marked: for few of them.
    pub markers: bool,
    /// Whether the line is dashed: for references.
    pub dashed: bool,
}

impl Series {
    /// A solid line with a name.
    pub fn new(label: impl Into<String>, points: Vec<(f64, f64)>, ink: Ink) -> Self {
        Series { label: Some(label.into()), points, ink, markers: false, dashed: false }
    }

    /// Leaves it out of the legend.
    #[must_use]
    pub fn unnamed(mut self) -> Self {
        self.label = None;
        self
    }

    /// Marks its points.
    #[must_use]
    pub fn marked(mut self) -> Self {
        self.markers = true;
        self
    }

    /// Dashes it.
    #[must_use]
    pub fn dashed(mut self) -> Self {
        self.dashed = true;
        self
    }
}

/// A square matrix of values that are shown from `-limit` to `limit`, zero in the middle.
#[derive(Debug, Clone, PartialEq)]
pub struct HeatMap {
    /// Rows and columns.
    pub n: usize,
    /// `[n, n]`, row-major, the first row at the top; `None` is left blank.
    pub values: Vec<Option<f64>>,
    /// Values beyond it get the colour of the end.
    pub limit: f64,
    /// What the colours mean, beside the colour bar.
    pub legend: String,
}

/// One bar.
#[derive(Debug, Clone, PartialEq)]
pub struct Bar {
    /// Name, at its left.
    pub label: String,
    /// Length.
    pub value: f64,
    /// Text at its right end.
    pub text: String,
    /// Colour.
    pub ink: Ink,
}

/// Rows of bars; the chart is as high as they need.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows {
    /// What the values of every row are, in their order.
    pub legend: Vec<(&'static str, Ink)>,
    /// The rows.
    pub rows: Vec<Row>,
    /// Whether the bars of a row are set end to end instead of one below the other.
    pub stacked: bool,
}

/// One row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Name, at its left.
    pub label: String,
    /// Lengths, as many as the legend has entries; what is not finite is left out.
    pub values: Vec<f64>,
    /// Text at its right end.
    pub text: String,
}
