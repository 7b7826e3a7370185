use crate::Result;
use crate::plots::Chart;
use polars::prelude::{Column, DataFrame};

/// One part of the page.
#[derive(Debug, Clone)]
pub struct Section {
    /// Name in the page's addresses and of the plots' files.
    pub id: &'static str,
    /// Heading.
    pub title: &'static str,
    /// What to measure if there is nothing to show, as a command line.
    pub missing: &'static str,
    /// Charts.
    pub figures: Vec<Figure>,
    /// Tables.
    pub tables: Vec<Table>,
}

/// A chart and what it says.
#[derive(Debug, Clone)]
pub struct Figure {
    /// The chart.
    pub chart: Chart,
    /// One sentence.
    pub reading: String,
    /// What its file is called, after the section; its number if `None`.
    pub name: Option<&'static str>,
}

/// A table and what it is of.
#[derive(Debug, Clone)]
pub struct Table {
    /// What it is of.
    pub caption: String,
    /// Its columns; names are the headings.
    pub data: DataFrame,
}

impl Section {
    /// An empty one.
    pub(crate) fn new(id: &'static str, title: &'static str, missing: &'static str) -> Self {
        Section { id, title, missing, figures: Vec::new(), tables: Vec::new() }
    }
}

impl Figure {
    pub(crate) fn new(chart: Chart, reading: String) -> Self {
        Figure { chart, reading, name: None }
    }

    pub(crate) fn named(mut self, name: &'static str) -> Self {
        self.name = Some(name);
        self
    }
}

impl Table {
    pub(crate) fn new(caption: impl Into<String>, columns: Vec<Column>) -> Result<Self> {
        let height = columns.first().map_or(0, Column::len);
        Ok(Table { caption: caption.into(), data: DataFrame::new(height, columns)? })
    }
}
