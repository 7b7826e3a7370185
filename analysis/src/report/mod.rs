//! One offline HTML page from whatever was measured.
//!
//! | concept | where |
//! | --- | --- |
//! | files and folders that are understood | [`Inputs`] |
//! | statistics of neurons, of a profile or a split | [`Neurons`] |
//! | sections with charts, readings and tables | [`Section`], [`Figure`] |
//! | the page | [`Page`] |

mod accuracy;
mod figures;
mod html;
mod inputs;
mod neurons;
mod page;
mod section;
mod sparsity;
mod speed;
mod table;

pub use inputs::{BenchFile, EvalFile, Inputs, RunFile, Tiers};
pub use neurons::{LayerFigures, Neurons};
pub use page::Page;
pub use section::{Figure, Section, Table};
