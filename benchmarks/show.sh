#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# show.sh: draws the plots of benchmarks/results/h200_compare.csv and puts its tables into README.md. Needs
# benchmarks/target/benchmarks.jar (see pom.xml), java and python3.
set -e
cd "$(dirname "$0")"
java -cp target/benchmarks.jar io.octolora.benchmarks.plots.Plots results
python3 peers/table.py results/h200_compare.csv ../README.md
