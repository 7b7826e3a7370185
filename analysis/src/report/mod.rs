//! One offline HTML page from whatever was measured.
//!
//! | concept | where |
//! | --- | --- |
//! | files and folders that are understood | [`Inputs`] |
//! | statistics of neurons, of a profile or a split | [`Neurons`] |
//! | GPU benches that differ in one setting | [`sweeps`] |
//! | sections with charts, readings and tables | [`Section`], [`Figure`] |
//! | the page | [`Page`] |

mod accuracy;
mod figures;
mod gpu_record;
mod gpu_speed;
mod html;
mod inputs;
mod neurons;
mod page;
mod planes;
mod predictors;
mod quantity;
mod section;
mod settings;
mod shares;
mod sparsity;
mod speed;
mod table;
mod tasks;
mod vram_share;

pub use gpu_record::{
    Asked, AskedMode, CpuShare, GpuAlone, GpuAsked, GpuBenchFile, GpuPlanned, GpuPromise, GpuSettings, GpuTiming,
};
pub use inputs::{BenchFile, EvalFile, Inputs, Planned, PlantedFile, RunFile, Speed, TaskRecord, TasksFile, Tiers};
pub use neurons::{Divided, LayerFigures, Neurons};
pub use page::Page;
pub use section::{Figure, Section, Table};
pub use settings::{Setting, Sweep, sweeps};
