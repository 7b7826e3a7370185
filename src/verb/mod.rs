//! One file a verb: arguments to library calls, results to text.

mod bench;
mod calibrate;
mod completions;
mod delta;
#[cfg(feature = "analysis")]
mod demo;
mod doctor;
#[cfg(feature = "analysis")]
mod eval;
#[cfg(feature = "analysis")]
mod eval_tasks;
mod inspect;
mod load;
mod plan;
#[cfg(feature = "analysis")]
mod report;
mod run;
mod split;
mod verify;

use crate::cli::Verb;
use crate::settings::Settings;

/// Runs one verb.
pub fn dispatch(verb: Verb, settings: &Settings) -> anyhow::Result<()> {
    match verb {
        #[cfg(feature = "analysis")]
        Verb::Demo(args) => demo::demo(&args),
        Verb::Run(args) => run::run(&args),
        Verb::Calibrate(args) => calibrate::calibrate(&args),
        Verb::Split(args) => split::split(&args),
        Verb::Delta(args) => delta::delta(&args),
        Verb::Plan(args) => plan::plan(&args),
        Verb::Verify(args) => verify::verify(&args),
        #[cfg(feature = "analysis")]
        Verb::Eval(args) => eval::eval(&args),
        Verb::Bench(args) => bench::bench(&args),
        #[cfg(feature = "analysis")]
        Verb::Report(args) => report::report(&args),
        Verb::Inspect(args) => inspect::inspect(&args),
        Verb::Doctor(args) => doctor::doctor(&args, settings),
        Verb::Completions(args) => completions::completions(&args),
    }
}
