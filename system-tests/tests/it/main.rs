//! Scenarios over the running stack. Each file is one part of what a user relies on.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod agents;
mod backup;
mod clients;
mod command_line;
mod conformance;
mod console;
mod contract;
mod deployment;
mod dev;
mod failures;
mod faults;
mod git;
mod hardening;
mod images;
mod leaks;
mod model_gateways;
mod network;
mod observability;
mod packages;
mod partitions;
mod permissions;
mod prepared;
mod repositories;
mod resources;
mod rolling;
mod runtimes;
mod spares;
mod sprites_api;
mod steering;
mod streams;
mod supervision;
mod tls;
mod transport;
mod v1;
