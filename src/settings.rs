//! The settings file: defaults of one's own, in TOML, for the flags of the verbs.
//!
//! A flag wins over the environment, that over the file, that over the built-in default. The file changes the defaults
//! of the command line before it is parsed, so that clap itself keeps that order; every value is checked against its
//! flag first, used or not.

use crate::exit::Usage;
use clap::{Arg, ArgAction, Command};
use std::ffi::OsString;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};

/// Flags that may stand above all sections, for every verb that has them.
const COMMON: [&str; 7] = ["threads", "mode", "active", "max-ppl-increase", "ram-budget", "vram-budget", "ctx-size"];
/// Flags that belong to one run: a file that sets them for every run would be a trap.
const NEVER: [&str; 11] =
    ["config", "prompt", "file", "system", "chat", "output", "resume", "shard", "planted", "delta", "help"];
/// No settings file is larger.
const MAX_BYTES: u64 = 1 << 20;

/// The file in effect, if any.
pub struct Settings {
    /// The file that was read.
    pub path: Option<PathBuf>,
    /// Where one is looked for without `--config`; `None` without a home folder.
    pub usual_path: Option<PathBuf>,
    /// Verb and flag of everything that it sets.
    pub set: Vec<(String, String)>,
}

/// Finds the file that `arguments` or the environment name, or the usual one if it exists, and makes it the defaults of
/// `command`.
///
/// # Errors
/// If it cannot be read, is no TOML, has a key that is no flag of its section's verb, or a value that the flag does not
/// accept; the message names file, line and key.
pub fn apply(command: Command, arguments: &[OsString]) -> Result<(Command, Settings), Usage> {
    let usual_path = usual_path();
    let path = named(&command, arguments).or_else(|| usual_path.clone().filter(|p| p.exists()));
    let mut settings = Settings { path, usual_path, set: Vec::new() };
    let Some(path) = settings.path.clone() else { return Ok((command, settings)) };
    let text = read(&path).map_err(|reason| Usage(format!("settings file {}: {reason}", path.display())))?;
    let file = File { path: &path, text: &text };
    let table = DeTable::parse(&text).map_err(|e| file.refuse(e.span(), "", e.message()))?;
    let mut command = command;
    for (key, value) in table.get_ref() {
        let (name, at) = (key.get_ref().as_ref(), key.span());
        if let DeValue::Table(section) = value.get_ref() {
            let Some(verb) = command.find_subcommand(name) else {
                let verbs: Vec<&str> = command.get_subcommands().map(Command::get_name).collect();
                return Err(file.refuse(Some(at), name, &format!("no such verb; there are {}", verbs.join(", "))));
            };
            let mut verb = verb.clone();
            for (key, value) in section {
                let (flag, at) = (key.get_ref().as_ref(), key.span());
                verb = set(verb, &file, flag, at, value.get_ref())?;
                settings.set.push((name.to_owned(), flag.to_owned()));
            }
            command = command.mut_subcommand(name, |_| verb);
            continue;
        }
        if !COMMON.contains(&name) {
            let text = format!("no common setting (those are {}); put it in its verb's section", COMMON.join(", "));
            return Err(file.refuse(Some(at), name, &text));
        }
        let having = |c: &&Command| flag(c, name).is_some();
        let verbs: Vec<String> = command.get_subcommands().filter(having).map(|c| c.get_name().to_owned()).collect();
        for verb in verbs {
            let own = matches!(table.get_ref().get(verb.as_str()).map(|v| v.get_ref()), Some(DeValue::Table(t)) if t.contains_key(name));
            if own {
                continue;
            }
            let Some(sub) = command.find_subcommand(&verb) else { continue };
            let sub = set(sub.clone(), &file, name, at.clone(), value.get_ref())?;
            command = command.mut_subcommand(&verb, |_| sub);
            settings.set.push((verb, name.to_owned()));
        }
    }
    Ok((command, settings))
}

/// `--config` or `THERMOCLINE_CONFIG`. Whatever else is wrong with the arguments is told when they are parsed in earnest.
fn named(command: &Command, arguments: &[OsString]) -> Option<PathBuf> {
    let matches = command.clone().ignore_errors(true).try_get_matches_from(arguments).ok()?;
    matches.get_one::<PathBuf>("config").cloned()
}

fn usual_path() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    // The XDG base directory specification: a relative path there is to be ignored.
    let config =
        folder("XDG_CONFIG_HOME").filter(|p| p.is_absolute()).or_else(|| folder("HOME").map(|h| h.join(".config")))?;
    Some(config.join("thermocline/config.toml"))
}

fn read(path: &Path) -> Result<String, String> {
    let bytes = std::fs::metadata(path).map_err(|e| e.to_string())?.len();
    if bytes > MAX_BYTES {
        return Err(format!("{bytes} bytes; at most {MAX_BYTES} are read"));
    }
    std::fs::read_to_string(path).map_err(|e| e.to_string())
}

struct File<'a> {
    path: &'a Path,
    text: &'a str,
}

impl File<'_> {
    fn refuse(&self, at: Option<Range<usize>>, key: &str, reason: &str) -> Usage {
        let before = self.text.get(..at.map_or(0, |at| at.start)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let key = if key.is_empty() { String::new() } else { format!("{key}: ") };
        Usage(format!("settings file {}, line {line}: {key}{}", self.path.display(), reason.trim()))
    }
}

/// A verb's flag of that name that a file may set.
fn flag<'a>(verb: &'a Command, name: &str) -> Option<&'a Arg> {
    verb.get_arguments().find(|a| a.get_long() == Some(name)).filter(|_| !NEVER.contains(&name))
}

/// Makes `value` the default of a verb's flag.
fn set(verb: Command, file: &File<'_>, name: &str, at: Range<usize>, value: &DeValue<'_>) -> Result<Command, Usage> {
    let refuse = |reason: &str| file.refuse(Some(at.clone()), name, reason);
    let Some(arg) = flag(&verb, name) else {
        let known = verb.get_arguments().filter_map(Arg::get_long).filter(|f| !NEVER.contains(f));
        let known: Vec<&str> = known.collect();
        return Err(refuse(&format!("no setting of `{}`, which has {}", verb.get_name(), known.join(", "))));
    };
    let many = arg.get_value_delimiter().is_some() || matches!(arg.get_action(), ArgAction::Append);
    let values = match value {
        DeValue::Array(items) if many => items.iter().map(|item| plain(item.get_ref())).collect(),
        other => plain(other).map(|text| vec![text]),
    };
    let values =
        values.ok_or_else(|| refuse(if many { "expected a value or a list of them" } else { "expected one value" }))?;
    let switch = matches!(arg.get_action(), ArgAction::SetTrue);
    if switch && !matches!(value, DeValue::Boolean(_)) {
        return Err(refuse("expected true or false"));
    }
    for value in values.iter().filter(|_| !switch) {
        check(arg, value).map_err(|reason| refuse(&reason))?;
    }
    let id = arg.get_id().clone();
    Ok(verb.mut_arg(id, |arg| {
        // A switch that a file turns on can be turned off again: --json=false.
        let arg = if switch {
            let parser = clap::value_parser!(bool);
            arg.action(ArgAction::Set)
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true")
                .value_parser(parser)
        } else {
            arg
        };
        arg.required(false).default_values(values)
    }))
}

/// A value as it would be written on the command line.
fn plain(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(n) => i64::from_str_radix(n.as_str(), n.radix()).ok().map(|n| n.to_string()),
        DeValue::Float(x) => Some(x.as_str().to_owned()),
        DeValue::Boolean(b) => Some(b.to_string()),
        _ => None,
    }
}

/// Whether the flag's own parser takes `value`.
fn check(arg: &Arg, value: &str) -> Result<(), String> {
    let alone = Arg::new("value").value_parser(arg.get_value_parser().clone()).allow_hyphen_values(true).required(true);
    let parsed = Command::new("settings").no_binary_name(true).arg(alone).try_get_matches_from(["--", value]);
    let Err(error) = parsed else { return Ok(()) };
    let cause = std::error::Error::source(&error).map(ToString::to_string);
    let allowed: Vec<String> = arg.get_possible_values().iter().map(|v| v.get_name().to_owned()).collect();
    Err(match cause {
        Some(cause) => format!("{value:?}: {cause}"),
        None if !allowed.is_empty() => format!("{value:?}: expected one of {}", allowed.join(", ")),
        None => format!("{value:?} is not accepted"),
    })
}
