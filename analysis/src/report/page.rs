//! The page: header, sections, command lines.

use super::html::{escape, style};
use super::{Inputs, Section, accuracy, gpu_speed, planes, shares, sparsity, speed, table};
use crate::plots::Chart;
use crate::{Error, Result};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// A finished report.
#[derive(Debug)]
pub struct Page {
    inputs: Inputs,
    command: Vec<String>,
    sections: Vec<Section>,
}

impl Page {
    /// Draws up the sections. `command` are the arguments that the report was asked for with.
    ///
    /// # Errors
    /// None in practice; building tables is fallible.
    pub fn new(inputs: Inputs, command: Vec<String>) -> Result<Self> {
        let sections = vec![
            sparsity::rates(&inputs.neurons)?,
            sparsity::coactivation(&inputs.neurons),
            sparsity::overlap(&inputs.neurons),
            shares::division(&inputs.neurons),
            accuracy::accuracy(&inputs.evals, &inputs.tasks)?,
            accuracy::recall(&inputs.evals),
            planes::planes(&inputs.evals)?,
            speed::runs(&inputs.runs)?,
            speed::benches(&inputs.benches)?,
            gpu_speed::benches(&inputs.gpu_benches, &inputs.planted)?,
        ];
        Ok(Page { inputs, command, sections })
    }

    /// The sections, in order.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The whole page: one file, nothing from elsewhere, no scripts.
    ///
    /// # Errors
    /// If a chart cannot be drawn.
    pub fn html(&self) -> Result<String> {
        let title = escape(&format!("Thermocline report: {}", self.subject()));
        let mut out = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
             <title>{title}</title>\n<style>\n{}</style>\n</head>\n<body>\n",
            style()
        );
        let _ = write!(out, "<h1>{title}</h1>\n<nav>");
        for s in self.sections.iter().filter(|s| !s.is_empty()) {
            let _ = write!(out, "<a href=\"#{}\">{}</a>", s.id, escape(s.title));
        }
        out.push_str("</nav>\n");
        self.header(&mut out);
        for section in &self.sections {
            section.html(&mut out)?;
        }
        self.commands(&mut out);
        out.push_str("</body>\n</html>\n");
        Ok(out)
    }

    /// Writes the page, to a temporary name first.
    ///
    /// # Errors
    /// If a chart cannot be drawn or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let html = self.html()?;
        let mut name = path.file_name().map(ToOwned::to_owned).unwrap_or_default();
        name.push(".tmp");
        let temporary = path.with_file_name(name);
        let io = |source| Error::Io { path: path.to_owned(), source };
        std::fs::write(&temporary, html).map_err(io)?;
        std::fs::rename(&temporary, path).map_err(io)
    }

    /// Writes every chart as a PNG into `dir`, which is made if need be; returns the files.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write_png(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        self.write_plots(dir, "png", Chart::write_png)
    }

    /// The same as SVG.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write_svg(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        self.write_plots(dir, "svg", Chart::write_svg)
    }

    fn write_plots(
        &self,
        dir: &Path,
        extension: &str,
        write: impl Fn(&Chart, &Path) -> Result<()>,
    ) -> Result<Vec<PathBuf>> {
        std::fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.to_owned(), source })?;
        let mut paths = Vec::new();
        for section in &self.sections {
            for (i, figure) in section.figures.iter().enumerate() {
                let name = figure.name.map_or_else(|| (i + 1).to_string(), ToOwned::to_owned);
                let path = dir.join(format!("{}-{name}.{extension}", section.id));
                write(&figure.chart, &path)?;
                paths.push(path);
            }
        }
        Ok(paths)
    }

    /// What the page is about, in a few words.
    fn subject(&self) -> String {
        let inputs = &self.inputs;
        let names = inputs.neurons.iter().map(|n| n.name.clone()).chain(inputs.evals.iter().map(|e| e.model.clone()));
        let names = names.chain(inputs.tasks.iter().map(|t| t.model.clone()));
        let names = names.chain(inputs.benches.iter().map(|b| b.model.clone()));
        let names = names.chain(inputs.gpu_benches.iter().map(|b| b.model.clone()));
        let mut names = names.chain(inputs.planted.iter().map(|p| p.model.clone()));
        names.find(|n| !n.is_empty()).unwrap_or_else(|| "runs".to_owned())
    }

    fn header(&self, out: &mut String) {
        for n in &self.inputs.neurons {
            let _ = write!(out, "<dl><dt>{}</dt><dd>{}</dd>", n.kind, escape(&n.name));
            for (what, value) in &n.facts {
                let _ = write!(out, "<dt>{what}</dt><dd>{}</dd>", escape(value));
            }
            out.push_str("</dl>\n");
        }
        let mut seen: Vec<(&str, &str, &str)> = Vec::new();
        for e in &self.inputs.evals {
            let subject = (e.model.as_str(), e.model_digest.as_str(), e.text.as_str());
            if seen.contains(&subject) {
                continue;
            }
            seen.push(subject);
            let tokens = e.results.first().map_or(0, |r| r.tokens);
            let _ = writeln!(
                out,
                "<dl><dt>evaluated</dt><dd>{} ({})</dd><dt>digest</dt><dd>{}</dd><dt>text</dt><dd>{}, {} windows of {} \
                 tokens, {tokens} counted</dd></dl>",
                escape(&e.model),
                escape(&e.encoding),
                escape(&e.model_digest),
                escape(&e.text),
                e.windows,
                e.ctx
            );
        }
    }

    fn commands(&self, out: &mut String) {
        out.push_str("<section id=\"commands\">\n<h2>Command lines</h2>\n");
        let inputs = &self.inputs;
        let all = inputs.evals.iter().map(|e| &e.command).chain(inputs.tasks.iter().map(|t| &t.command));
        let all = all.chain(inputs.runs.iter().map(|r| &r.command));
        let all = all.chain(inputs.benches.iter().map(|b| &b.command));
        let all = all.chain(inputs.gpu_benches.iter().map(|b| &b.command)).chain([&self.command]);
        for command in all.filter(|c| !c.is_empty()) {
            let _ = writeln!(out, "<p><code>thermocline {}</code></p>", escape(&command.join(" ")));
        }
        let _ = writeln!(out, "<p>Drawn by thermocline {}.</p>\n</section>", env!("CARGO_PKG_VERSION"));
    }
}

impl Section {
    /// Whether nothing was measured for it.
    pub fn is_empty(&self) -> bool {
        self.figures.is_empty() && self.tables.is_empty()
    }

    fn html(&self, out: &mut String) -> Result<()> {
        let _ = writeln!(out, "<section id=\"{}\">\n<h2>{}</h2>", self.id, escape(self.title));
        if self.is_empty() {
            let _ = writeln!(out, "<p class=\"missing\">Not measured. <code>{}</code></p>", escape(self.missing));
        }
        for figure in &self.figures {
            let caption = escape(&figure.reading);
            let _ = writeln!(out, "<figure>\n{}<figcaption>{caption}</figcaption>\n</figure>", figure.chart.to_svg()?);
        }
        for t in &self.tables {
            out.push_str(&table::to_html(t)?);
        }
        out.push_str("</section>\n");
        Ok(())
    }
}
