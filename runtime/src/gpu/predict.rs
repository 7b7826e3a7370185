//! How fast a plan should be, from its bytes and the speeds of the tiers.

use super::plan::GpuPlan;
use crate::plan::Mode;
use serde::Serialize;

/// Speeds that bound a token, in bytes a second.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct GpuSpeeds {
    /// Device memory, read by the product kernel.
    pub device: f64,
    /// Pinned host memory, read in place by the fused kernel.
    pub link: f64,
    /// The same, copied by the copy engine; 0 where no sketch is.
    pub copies: f64,
    /// The same memory, read and computed with by the host's threads; 0 without them.
    pub host: f64,
    /// The same of sketches; 0 without threads, or where no sketch lies there.
    pub sketches: f64,
}

impl GpuSpeeds {
    /// Of each the faster: measured twice, on a machine with other work to do.
    pub(super) fn or_faster(self, other: Self) -> Self {
        Self {
            device: self.device.max(other.device),
            link: self.link.max(other.link),
            copies: self.copies.max(other.copies),
            host: self.host.max(other.host),
            sketches: self.sketches.max(other.sketches),
        }
    }
}

/// What a layer costs beyond its bytes: six kernels, each of which fetches its input before it can begin and brings its
/// sums together at the end. Measured on an H200 (analysis/records/gpu-h200), as the next two.
const LAYER_SECONDS: f64 = 20e-6;

/// What the two kernels of the predictor and the choice add to it.
const CHOICE_SECONDS: f64 = 11e-6;

/// What either grows by for each column of the input, which every kernel reads, normalises and adds up.
const COLUMN_SECONDS: f64 = 14e-6 / 8192.0;

/// What it costs more if the host's threads take part: they must see the request, the last of them ends later than the mean
/// one, and it must be seen.
const EXCHANGE_SECONDS: f64 = 30e-6;

/// Share of the time between two layers' reads over the link that fetching early wins: it begins late and ends early,
/// some of what it brings is not needed, and the kernels beside it become slower. Where the host's threads take part it wins
/// nothing that could be measured.
const LOOKAHEAD_WINS: f64 = 0.45;

/// A speed and where it comes from.
#[derive(Debug, Clone, Serialize)]
pub struct GpuPrediction {
    /// Decode speed.
    pub tok_s: f64,
    /// Share of the cold neurons that are not cached which the host's threads compute.
    pub host_share: f64,
    /// Layers of which they choose and compute all neurons.
    pub host_layers: usize,
    /// `device`, `link` or `link + host`.
    pub bottleneck: &'static str,
    /// The formula, with its numbers.
    pub formula: String,
}

impl GpuPlan {
    /// Expected decode speed: device memory, then link and host side by side. Of the layers whose sketches are in pinned memory as many
    /// are left to the host as is fastest, or as were asked for.
    pub fn predict(&self, speeds: &GpuSpeeds) -> GpuPrediction {
        let possible = if speeds.sketches > 0.0 && speeds.host > 0.0 { self.host_layers() } else { 0 };
        let layers = match self.request.host_layers {
            Some(n) => n.min(possible)..=n.min(possible),
            None => 0..=possible,
        };
        let predictions = layers.map(|n| self.predict_with(speeds, n));
        let fastest = predictions.max_by(|a, b| a.tok_s.total_cmp(&b.tok_s));
        fastest.expect("a prediction for each number of layers, of which there is one at least")
    }

    /// Where `host_layers` are left to the host.
    fn predict_with(&self, speeds: &GpuSpeeds, host_layers: usize) -> GpuPrediction {
        // Where sketches are copied, they are most of what crosses.
        let link = if self.streamed_sketches > 0 { speeds.link.max(speeds.copies) } else { speeds.link };
        let device = (self.device_bytes_per_token + self.cache_bytes_per_token) as f64;
        let host = self.host_bytes_per_token as f64;
        let n_layers = self.hot_neurons.len() as f64;
        let device_seconds = device / speeds.device;
        let exchange = if speeds.host > 0.0 && host > 0.0 { EXCHANGE_SECONDS } else { 0.0 };
        let is_chosen = exchange > 0.0 || matches!(self.request.base.mode, Mode::Sparse { .. });
        let choice = if is_chosen { CHOICE_SECONDS } else { 0.0 };
        let between = n_layers * (LAYER_SECONDS + choice + COLUMN_SECONDS * self.hidden_size as f64 + exchange);
        let early = if speeds.host > 0.0 {
            0.0
        } else {
            (self.lookahead_bytes_per_token as f64).min((device_seconds + between) * link * LOOKAHEAD_WINS).min(host)
        };
        // Rows of the host's layers are its own; their sketches are not copied.
        let pinned_sketches = self.streamed_bytes_per_token as f64;
        let hosts_sketches = pinned_sketches * host_layers as f64 / self.streamed_sketches.max(1) as f64;
        let sketches = pinned_sketches - hosts_sketches;
        let all_rows = host - early - pinned_sketches;
        let hosts_rows = all_rows * host_layers as f64 / n_layers;
        let rows = all_rows - hosts_rows;
        let hosts_seconds =
            if host_layers > 0 { hosts_sketches / speeds.sketches + hosts_rows / speeds.host } else { 0.0 };
        // Sketches cross the link while everything else goes on, too; the threads take part in the rest.
        let late = (sketches - (device_seconds + between + hosts_seconds) * link).max(0.0);
        let both = (late + rows) / (link + speeds.host);
        let host_seconds = both.max(late / link);
        let bottleneck = match (device_seconds > host_seconds + hosts_seconds, speeds.host > 0.0) {
            (true, _) => "device",
            (false, true) => "link + host",
            (false, false) => "link",
        };
        let gb = 1e9;
        let pinned = if host > 0.0 {
            let [rows, link, threads] = [rows + early, link, speeds.host].map(|v| v / gb);
            let streamed = match late / gb {
                late if sketches > 0.0 => format!(" + {late:.3} of {:.3} GB of sketches", sketches / gb),
                _ => String::new(),
            };
            let early = if early > 0.0 { format!(" - {:.3} fetched early", early / gb) } else { String::new() };
            format!(" + ({rows:.3}{early}{streamed}) GB pinned / ({link:.1} GB/s link + {threads:.1} GB/s host)")
        } else {
            String::new()
        };
        let by_host = if host_layers > 0 {
            let [sketches, rows, speed, threads] =
                [hosts_sketches, hosts_rows, speeds.sketches, speeds.host].map(|v| v / gb);
            format!(" + {sketches:.3} GB of sketches / {speed:.1} GB/s host + {rows:.3} GB / {threads:.1} GB/s host")
        } else {
            String::new()
        };
        GpuPrediction {
            tok_s: 1.0 / (device_seconds + host_seconds + hosts_seconds + between),
            host_share: if rows > 0.0 { (both * speeds.host / rows).min(1.0) } else { 0.0 },
            host_layers,
            bottleneck,
            formula: format!(
                "tok/s = 1 / ({:.2} GB device / {:.0} GB/s{pinned}{by_host} + {:.1} ms between kernels)",
                device / gb,
                speeds.device / gb,
                1e3 * between
            ),
        }
    }
}
